"""The frontier between calibration and what is kept, drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cft_jax.evaluate.report.plots import COLOURS, MUTED, new_figure
from cft_jax.evaluate.report.tables import split_title
from cft_jax.evaluate.suites.questions import OTHERS


def frontier_figure(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Exact KL of every split against the share of right answers to the questions that were not kept, by strength.

    `points` are those of `frontier.json`, by ascending strength.
    """
    figure, (ax,) = new_figure(5.6, 3.6, 1, 1)
    right = [point["halves"][OTHERS]["accuracy"] for point in points]
    for colour, split in zip(COLOURS, points[0]["splits"], strict=False):
        kl = [point["splits"][split]["kl"] for point in points]
        ax.plot(right, kl, color=colour, marker="o", markersize=3.8, linewidth=1.5, label=split_title(split))
        for point, x, y in zip(points, right, kl, strict=True):
            ax.annotate(f"{point['strength']:g}", (x, y), (4, 4), textcoords="offset points", fontsize=7, color=MUTED)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set(xlabel="right answers to questions that were not kept", ylabel="exact KL, nats")
    ax.legend()
    return figure
