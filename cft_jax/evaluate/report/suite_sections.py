"""Tables and plots of the suites beside structured sampling, several models side by side."""

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

from cft_jax.evaluate.parsing import ANSWER_LABELS
from cft_jax.evaluate.report import plots
from cft_jax.evaluate.report.overview import headlines_of, task_headlines
from cft_jax.evaluate.report.side_by_side import Run, figure_of, head_row, legend, table, value_cells
from cft_jax.evaluate.report.tables import number
from cft_jax.evaluate.suites.registry import SUITES

_RETENTION_TITLES = {
    "tiny_mmlu": "MMLU",
    "tiny_hellaswag": "HellaSwag",
    "tiny_truthfulqa": "TruthfulQA",
    "tiny_winogrande": "Winogrande",
    "tiny_gsm8k_strict": "GSM8K, strict",
    "tiny_gsm8k_flexible": "GSM8K, flexible",
}
# Labels of bars with more letters than this together are slanted.
_LEVEL_LETTERS = 60
# Figures beside the headlines, by suite: heading, path, whether it is a share, which way is better.
_FURTHER: Mapping[str, Sequence[tuple[str, tuple[str, ...], bool, int]]] = {
    "open_random": (
        ("prompts", ("num_prompts",), False, 0),
        ("samples per prompt", ("settings", "num_samples"), False, 0),
        ("empty answers", ("mean_empty_rate",), True, -1),
        ("next tokens that hold 50 %, median", ("median_support_sizes", "0.50"), False, 1),
        ("next tokens that hold 90 %, median", ("median_support_sizes", "0.90"), False, 1),
        ("next tokens that hold 99 %, median", ("median_support_sizes", "0.99"), False, 1),
    ),
    "mcq": (
        ("questions", ("num_samples",), False, 0),
        ("chi-square, 3 degrees of freedom", ("chi_square_statistic",), False, -1),
        ("its p-value", ("chi_square_pvalue",), False, 0),
        ("largest deviation from uniform", ("max_abs_deviation_from_uniform",), False, -1),
        *((f"answer {label}", (f"freq_{label.lower()}",), True, 0) for label in ANSWER_LABELS),
    ),
    "noveltybench": (("prompts", ("overall", "num_prompts"), False, 0),),
    "perplexity": (
        ("documents", ("total", "num_documents"), False, 0),
        ("perplexity, with BOS, every token", ("total", "covering", "perplexity"), False, -1),
        ("bits per byte, the paper's", ("total", "paper", "bits_per_byte"), False, -1),
    ),
    "retention": tuple(
        (f"{title}, {name}", ("tinybenchmarks", "tasks", task, figure), True, 1)
        for task, title in _RETENTION_TITLES.items()
        for figure, name in (("accuracy", "accuracy"), ("gpirt", "gp-IRT"))
    ),
}


def suite_section(runs: Sequence[Run], suite: str, styles: Mapping[str, int]) -> str:
    """A suite's table with differences to the first run, its plots, and every other number folded away."""
    of_suite = [run for run in runs if run.summary["suite"] == suite and "missing" not in run.summary]
    if not of_suite:
        return ""
    summaries = [run.summary for run in of_suite]
    # Tasks in a group come after the groups that were asked for.
    headlines = dict.fromkeys([*headlines_of(suite, summaries), *task_headlines(summaries)])
    figures = [(h.title, h.path, h.is_share, h.better) for h in headlines]
    rows = ""
    for heading, path, is_share, better in (*figures, *_FURTHER.get(suite, ())):
        values = [figure_of(run.summary, path) for run in of_suite]
        if any(value is not None for value in values):
            rows += f"<tr><td>{html.escape(heading)}</td>{value_cells(values, is_share, better)}</tr>"
    shown = table(head_row(of_suite, "", styles), rows) if rows else ""
    return f"<h2>{html.escape(SUITES[suite].title)}</h2>{shown}" + (
        _plots(of_suite, suite, styles) + _all_numbers(of_suite, styles)
    )


def _plots(runs: Sequence[Run], suite: str, styles: Mapping[str, int]) -> str:
    drawers = {
        "open_random": _open_random_plots,
        "mcq": _mcq_plots,
        "noveltybench": _noveltybench_plots,
        "perplexity": _perplexity_plots,
        "retention": _retention_plots,
    }
    figures = ""
    for title, figure in drawers[suite](runs, styles) if suite in drawers else ():
        image = plots.svg(figure, f"{suite}-{re.sub(r'[^a-z]+', '-', title.lower())}", title)
        figures += f"<figure><figcaption><span><b>{html.escape(title)}</b></span></figcaption>{image}</figure>"
    return f'{legend(runs, styles, target=False)}<div class="gallery">{figures}</div>' if figures else ""


def _open_random_plots(runs: Sequence[Run], styles: Mapping[str, int]) -> Iterator[tuple[str, Figure]]:
    sizes = {run.name: run.summary["median_support_sizes"] for run in runs if "median_support_sizes" in run.summary}
    if sizes:
        yield "Next tokens that hold a given probability, median", _support_figure(sizes, styles)


def _mcq_plots(runs: Sequence[Run], styles: Mapping[str, int]) -> Iterator[tuple[str, Figure]]:
    names = [f"freq_{label.lower()}" for label in ANSWER_LABELS]
    shares = {run.name: [run.summary[name] for name in names] for run in runs if names[0] in run.summary}
    if shares:
        yield "Where the right answer stands", _bars_figure(ANSWER_LABELS, shares, styles, percent=True, uniform=True)


def _noveltybench_plots(runs: Sequence[Run], styles: Mapping[str, int]) -> Iterator[tuple[str, Figure]]:
    splits = list(dict.fromkeys(split for run in runs for split in run.summary.get("splits", {})))
    for name, title in (("mean_distinct", "Distinct answers"), ("mean_utility", "Utility")):
        if heights := _bars(runs, [("splits", split, name) for split in splits]):
            yield title, _bars_figure(splits, heights, styles)


def _perplexity_plots(runs: Sequence[Run], styles: Mapping[str, int]) -> Iterator[tuple[str, Figure]]:
    slices = list(dict.fromkeys(name for run in runs for name in run.summary.get("slices", {})))
    if bits := _bars(runs, [("slices", name, "covering", "bits_per_byte") for name in slices]):
        yield "Bits per byte", _bars_figure(slices, bits, styles)


def _retention_plots(runs: Sequence[Run], styles: Mapping[str, int]) -> Iterator[tuple[str, Figure]]:
    asked = [
        (task, title)
        for task, title in _RETENTION_TITLES.items()
        if any(task in run.summary.get("tinybenchmarks", {"tasks": {}})["tasks"] for run in runs)
    ]
    if shares := _bars(runs, [("tinybenchmarks", "tasks", task, "accuracy") for task, _ in asked]):
        yield "Accuracy", _bars_figure([title for _, title in asked], shares, styles, percent=True)
    of_tasks = [h for h in headlines_of("retention", [run.summary for run in runs]) if h.path[0] == "lm_eval"]
    of_tasks = [headline for headline in of_tasks if headline.is_share]
    if shares := _bars(runs, [headline.path for headline in of_tasks]):
        yield "lm-eval", _bars_figure([headline.title for headline in of_tasks], shares, styles, percent=True)


def _bars(runs: Sequence[Run], paths: Sequence[tuple[str, ...]]) -> dict[str, list[float]]:
    """Heights of bars by run, no bar where a figure is missing; runs without any are left out."""
    found = {run.name: [figure_of(run.summary, path) for path in paths] for run in runs}
    return {
        name: [math.nan if value is None else float(value) for value in values]
        for name, values in found.items()
        if any(value is not None for value in values)
    }


def _support_figure(sizes: Mapping[str, Mapping[str, float]], styles: Mapping[str, int]) -> Figure:
    figure, (ax,) = plots.new_figure(5.6, 2.6, 1, 1)
    for name, by_mass in sizes.items():
        ax.plot([float(mass) for mass in by_mass], list(by_mass.values()), **plots.line_style(styles[name]))
    ax.set_yscale("log")
    ax.set(xlim=(0, 1), xlabel="probability", ylabel="tokens")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.yaxis.set_minor_locator(NullLocator())
    return figure


def _bars_figure(
    labels: Sequence[str],
    values: Mapping[str, Sequence[float]],
    styles: Mapping[str, int],
    *,
    percent: bool = False,
    uniform: bool = False,
) -> Figure:
    figure, (ax,) = plots.new_figure(5.6, 2.6, 1, 1)
    width = 0.8 / len(values)
    for place, (name, heights) in enumerate(values.items()):
        left = [index - 0.4 + (place + 0.5) * width for index in range(len(labels))]
        ax.bar(left, heights, 0.92 * width, color=plots.line_style(styles[name])["color"], linewidth=0)
    if uniform:
        ax.axhline(1 / len(labels), color=plots.INK, linewidth=0.9, linestyle=(0, (2, 2)))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right"} if sum(map(len, labels)) > _LEVEL_LETTERS else {}
    ax.set_xticks(range(len(labels)), labels, parse_math=False, **slanted)
    return figure


def _all_numbers(runs: Sequence[Run], styles: Mapping[str, int]) -> str:
    flat = [_numbers(run.summary, "") for run in runs]
    rows = ""
    for name in dict.fromkeys(name for values in flat for name in values):
        cells = "".join(f"<td>{number(values.get(name))}</td>" for values in flat)
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    if not rows:
        return ""
    return f"<details><summary>Every figure</summary>{table(head_row(runs, 'figure', styles), rows)}</details>"


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            if name != "settings":
                found |= _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found
