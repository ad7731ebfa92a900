"""Plots of evaluations: the target against the model before and after, calibration, the loss.

Functions draw on given axes and know nothing of files; `svg` and `png` turn a figure into bytes. Colours are the same
everywhere (target grey, before orange, after blue: told apart by colour-blind readers too), and before is dashed, so
that a grey print still tells them apart.
"""

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from cft_jax.evaluate.metrics.exact import as_numbers

# Each colour stands for a CSS variable of the report, which has a light, a dark and a printed value of it.
INK, MUTED, GRID = "#1b1f29", "#667085", "#e4e7ed"
TARGET, BEFORE, AFTER = "#d3d8e0", "#d9730d", "#1f6feb"
GREEN, PURPLE, RED, TEAL = "#0f8a5f", "#8b46c8", "#cf3341", "#0e8ea8"
_CSS_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    TARGET: "target",
    BEFORE: "before",
    AFTER: "after",
    GREEN: "green",
    PURPLE: "purple",
    RED: "red",
    TEAL: "teal",
}
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.xmargin": 0.02,
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "xtick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}
_CAPTION: dict[str, Any] = {"fontsize": 8, "color": MUTED, "pad": 4}
_MAX_BARS = 45
_DENSITY_BINS = 44
_MAX_STEPS = 160
# Labels of text values stand upright while they have no more characters than this in all.
_LABEL_CHARACTERS = 80
# Where continuous targets are cut in plots: a heavy tail would leave nothing to see of the middle.
_SHOWN_QUANTILES = (0.01, 0.99)


@dataclass(frozen=True, eq=False)
class Panel:
    """One prompt's distributions.

    Attributes:
      title: the family, or the beginning of the prompt.
      subtitle: its parameters.
      kind: `continuous`, `discrete` (integers or listed numbers) or `text`.
      values: the strings.
      target: their probabilities.
      models: name → a model's probabilities of them, not renormalised; the last is the one that matters most.
      styles: name → number of a model's style, the same in every plot of a page.
    """

    title: str
    subtitle: str
    kind: str
    values: tuple[str, ...]
    target: Float[np.ndarray, "N"]
    models: Mapping[str, Float[np.ndarray, "N"]]
    styles: Mapping[str, int]


# Colour, line and dot by number of a style.
COLOURS = (BEFORE, AFTER, GREEN, PURPLE, RED, TEAL)
_DASHES = ((0, (3.2, 1.6)), "solid", (0, (6, 1.5, 1.2, 1.5)), (0, (1.2, 1.2)), (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = ("D", "o", "s", "^", "v", "P")
STAGE_STYLES = {"before": 0, "after": 1}


def colour_variable(style: int) -> str:
    """The CSS variable of a style's colour."""
    return _CSS_VARIABLES[COLOURS[style % len(COLOURS)]]


def line_style(style: int) -> dict[str, Any]:
    """How matplotlib draws a style's line."""
    style %= len(COLOURS)
    return {"color": COLOURS[style], "linestyle": _DASHES[style], "linewidth": 1.7 if style else 1.5}


def _dot(style: int) -> dict[str, Any]:
    style %= len(COLOURS)
    size = {"markersize": 3.8} if style else {"markersize": 3.2, "fillstyle": "none", "markeredgewidth": 1.1}
    return {"color": COLOURS[style], "marker": _MARKERS[style], "linestyle": "none", **size}


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure in the common style and its axes, row by row; sizes in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [ax for row in axes for ax in row]


def panel_figure(panel: Panel) -> Figure:
    """One prompt: probabilities beside their cumulative sums; text values have no order, so only the former."""
    if panel.kind == "text":
        figure, axes = new_figure(5.6, 1.95, 1, 1)
    else:
        figure, axes = new_figure(5.6, 1.95, 1, 2)
        draw_cumulative(axes[1], panel)
        axes[1].set_title("cumulative probability", **_CAPTION)
    draw_probabilities(axes[0], panel)
    axes[0].set_title("density" if panel.kind == "continuous" else "probability", **_CAPTION)
    return figure


def gallery_figure(panels: Sequence[Panel], columns: int) -> Figure:
    """Several prompts in a grid, probabilities only, under one legend: the picture of a result."""
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(3.5 * columns, 2.35 * rows + 0.4, rows, columns)
    for ax, panel in zip(axes, panels, strict=False):
        draw_probabilities(ax, panel)
        ax.set_title(panel.title, loc="left", color=INK, fontweight="bold", pad=16)
        ax.text(0, 1.03, panel.subtitle, transform=ax.transAxes, color=MUTED, fontsize=8, va="bottom")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    with matplotlib.rc_context(_STYLE):
        figure.legend(*_legend_entries(), loc="outside upper right", ncols=3)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.12, h_pad=0.14)  # type: ignore[call-arg]
    return figure


def draw_probabilities(ax: Axes, panel: Panel) -> None:
    """Bars of probabilities for discrete values and texts, densities for continuous ones."""
    if panel.kind == "continuous":
        _draw_density(ax, panel)
    elif panel.kind == "discrete" and len(panel.values) > _MAX_BARS:
        _draw_mass_lines(ax, panel)
    else:
        _draw_bars(ax, panel)
    ax.yaxis.set_major_locator(MaxNLocator(4))


def draw_cumulative(ax: Axes, panel: Panel) -> None:
    """Cumulative probabilities; a model's ends at its mass on the listed values."""
    numbers, target, models = _sorted(panel)
    low, high = _shown_range(numbers, target, panel.kind)
    # Thousands of steps would only weigh down the page.
    inside = np.flatnonzero((numbers >= low) & (numbers <= high))
    taken = inside[np.unique(np.linspace(0, inside.size - 1, _MAX_STEPS).astype(int))]
    places = np.concatenate([[low], numbers[taken], [high]])

    def heights(masses: np.ndarray) -> np.ndarray:
        cumulative = np.append(0.0, np.cumsum(masses))
        return cumulative[np.concatenate([[taken[0]], taken + 1, [taken[-1] + 1]])]

    ax.fill_between(places, heights(target), step="post", color=TARGET, linewidth=0)
    for name, q in models:
        ax.step(places, heights(q), where="post", **line_style(panel.styles[name]))
    ax.set_xlim(low, high)
    ax.set_ylim(0, 1.02)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    if panel.kind == "discrete":
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def calibration_figure(curves: Mapping[str, Mapping[str, Sequence[float]]], styles: Mapping[str, int]) -> Figure:
    """The model's share below the target's quantiles, averaged over families; the diagonal is perfect.

    Args:
      curves: by model, the `calibration` section of a split's summary.
      styles: by model, as in `Panel`.
    """
    figure, (ax,) = new_figure(4.1, 3.6, 1, 1)
    levels = np.linspace(0, 1, len(next(iter(curves.values()))["model"]) + 1)
    ax.plot([0, 1], [0, 1], color=TARGET, linewidth=5, solid_capstyle="round")
    for name, curve in curves.items():
        line = line_style(styles[name])
        low, high = (np.append(0.0, curve[key]) for key in ("cumulative_p10", "cumulative_p90"))
        ax.fill_between(levels, low, high, color=line["color"], alpha=0.16, linewidth=0)
        ax.plot(levels, np.append(0.0, np.cumsum(curve["model"])), **line)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="target's share", ylabel="model's share", aspect="equal")
    ax.grid(True, axis="both")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def loss_figure(steps: Sequence[int], losses: Sequence[float]) -> Figure:
    """The training loss, with a running mean where steps are many; logarithmic where it falls far."""
    figure, (ax,) = new_figure(5.6, 3.6, 1, 1)
    values = np.asarray(losses, np.float64)
    window = max(1, len(values) // 40)
    ax.plot(steps, values, color=AFTER, linewidth=0.9 if window > 1 else 1.6, alpha=0.35 if window > 1 else 1.0)
    if window > 1:
        smooth = np.convolve(
            np.pad(values, (window // 2, (window - 1) // 2), mode="edge"), np.ones(window) / window, "valid"
        )
        ax.plot(steps, smooth, color=AFTER, linewidth=1.8)
    if values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1000 * values.min() else (1,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=0)
    ax.set(xlabel="step", ylabel="loss")
    return figure


def svg(figure: Figure, name: str, description: str) -> str:
    """An <svg> element for an HTML page: its text in the page's font, its colours from CSS variables.

    Args:
      figure: the figure.
      name: keeps the element's ids apart from those of other figures on the page.
      description: what it shows, for those who do not see it.
    """
    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), _any_script():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<style type.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r' id="(figure|axes|patch|matplotlib|xtick|ytick|line2d|text|legend)[^"]*"', "", element)
    element = re.sub(r"font-family: [^;\"]*;? ?", "", element)
    label = f'role="img" aria-label="{html.escape(description)}"'
    element = re.sub(r'(?<=<svg )([^>]*?)width="[^"]*" height="[^"]*"', lambda m: m[1] + label, element, count=1)
    for colour, variable in _CSS_VARIABLES.items():
        element = element.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", element)


def png(figure: Figure, dots_per_inch: int) -> bytes:
    """The figure as a PNG file on white."""
    data = io.BytesIO()
    with matplotlib.rc_context(_STYLE), _any_script():
        figure.savefig(data, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return data.getvalue()


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    """Silence about characters that matplotlib's own font lacks; a browser has others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _legend_entries() -> tuple[list[Any], list[str]]:
    handles = [Patch(facecolor=TARGET), *(Line2D([], [], **line_style(style)) for style in STAGE_STYLES.values())]
    return handles, ["target", "before training", "after training"]


def _sorted(panel: Panel) -> tuple[np.ndarray, np.ndarray, list[tuple[str, np.ndarray]]]:
    numbers = as_numbers(panel.values)
    assert numbers is not None
    order = np.argsort(numbers, kind="stable")
    return numbers[order], panel.target[order], [(name, q[order]) for name, q in panel.models.items()]


def _shown_range(numbers: np.ndarray, target: np.ndarray, kind: str) -> tuple[float, float]:
    """The range of a plot: where the target is, without its far tails."""
    cumulative = np.cumsum(target)
    low, high = np.searchsorted(cumulative, _SHOWN_QUANTILES)
    first, last = numbers[low], numbers[min(high, numbers.size - 1)]
    if kind == "discrete":
        return float(first) - 0.55, float(last) + 0.55
    # Short of the tails all is shown, up to the ends of a bounded support.
    if numbers[-1] - numbers[0] < 1.6 * (last - first):
        first, last = numbers[0], numbers[-1]
    margin = 0.02 * (last - first) or 0.5
    return float(first - margin), float(last + margin)


def _draw_density(ax: Axes, panel: Panel) -> None:
    numbers, target, models = _sorted(panel)
    edges = _edges(numbers)
    low, high = _shown_range(numbers, target, panel.kind)
    inside = np.flatnonzero((edges[1:] > low) & (edges[:-1] < high))
    # Bins of the plot are whole bins of the space, so that no mass is shared out.
    starts = np.arange(inside[0], inside[-1] + 1, max(1, -(-inside.size // _DENSITY_BINS)))
    end = inside[-1] + 1
    bounds = np.append(edges[starts], edges[end])

    def density(masses: np.ndarray) -> np.ndarray:
        return np.add.reduceat(masses[:end], starts) / np.diff(bounds)

    ax.stairs(density(target), bounds, fill=True, color=TARGET, linewidth=0)
    for name, q in models:
        ax.stairs(density(q), bounds, baseline=None, **line_style(panel.styles[name]))
    _limit_height(ax, density(target), [density(q) for _, q in models])
    ax.set_xlim(low, high)


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Edges of the bins that sorted numbers stand for: half-way between neighbours."""
    if numbers.size == 1:
        return np.array([numbers[0] - 0.5, numbers[0] + 0.5])
    middle = (numbers[1:] + numbers[:-1]) / 2
    return np.concatenate([[2 * numbers[0] - middle[0]], middle, [2 * numbers[-1] - middle[-1]]])


def _limit_height(ax: Axes, target: np.ndarray, models: Sequence[np.ndarray]) -> None:
    """Cuts off what towers over the target, but for the last model, so that the rest can be seen."""
    heights = [float(q.max()) for q in models]
    wanted = max([float(target.max()), *heights[-1:]])
    ax.set_ylim(0, 1.12 * max(wanted, min(max(heights, default=0.0), 1.6 * wanted)))


def _draw_bars(ax: Axes, panel: Panel) -> None:
    if panel.kind == "text":
        order = np.argsort(-panel.target, kind="stable")[:_MAX_BARS]
        places, labels = np.arange(order.size, dtype=np.float64), [panel.values[i] for i in order]
        fits = sum(len(label) + 2 for label in labels) < _LABEL_CHARACTERS
        ax.set_xticks(places, labels, rotation=0 if fits else 40, ha="center" if fits else "right", parse_math=False)
        target, models = panel.target[order], [(name, q[order]) for name, q in panel.models.items()]
    else:
        places, target, models = _sorted(panel)
        ax.set_xlim(*_shown_range(places, target, panel.kind))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    width = 0.8 * float(np.diff(places).min()) if places.size > 1 else 0.8
    ax.bar(places, target, width, color=TARGET, linewidth=0)
    for name, q in models:
        ax.plot(places, q, **_dot(panel.styles[name]))
    _limit_height(ax, target, [q for _, q in models])


def _draw_mass_lines(ax: Axes, panel: Panel) -> None:
    numbers, target, models = _sorted(panel)
    ax.fill_between(numbers, target, step="mid", color=TARGET, linewidth=0)
    for name, q in models:
        ax.step(numbers, q, where="mid", **line_style(panel.styles[name]))
    ax.set_xlim(*_shown_range(numbers, target, panel.kind))
    _limit_height(ax, target, [q for _, q in models])
