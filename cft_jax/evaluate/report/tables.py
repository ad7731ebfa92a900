"""Tables of a page: a column per model, a row per metric, with differences to the first model. Pure."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cft_jax.distributions.splits import OOD, OOD_LISTS, TRAIN, UNSEEN
from cft_jax.evaluate.report.conditions import measured_alike
from cft_jax.evaluate.report.runs import Run, flat, section_at, value_at
from cft_jax.evaluate.suites.protocol import Headline

# What the structured suite measures in a split.
METRICS = (
    Headline("prompts", ("num_prompts",), 0),
    Headline("exact KL, nats", ("exact", "kl"), -1),
    Headline("total variation", ("exact", "total_variation"), -1),
    Headline("mass on the support", ("exact", "support_mass"), 1, is_share=True),
    Headline("Wasserstein-1, exact", ("exact", "wasserstein_1"), -1),
    Headline("Wasserstein-1 / IQR, exact", ("exact_scaled", "wasserstein_1_over_iqr"), -1),
    Headline("total variation, cells", ("exact_cells", "total_variation"), -1),
    Headline("Wasserstein-1, cells", ("exact_cells", "wasserstein_1"), -1),
    Headline("path KL of the paper, nats", ("path", "logit_kl"), -1),
    Headline("valid answers", ("sampled", "valid_rate"), 1, is_share=True),
    Headline("outside the support", ("sampled", "support_violation_rate"), -1, is_share=True),
    Headline("error of the mean", ("sampled", "mean_error"), -1),
    Headline("error of the variance", ("sampled", "variance_error"), -1),
    Headline("Wasserstein-1, sampled", ("sampled", "wasserstein_1"), -1),
)
_OF_FAMILIES = ("prompts", "exact KL, nats", "total variation", "Wasserstein-1, exact", "valid answers")
_TESTS = {
    "ks_randomised": "Kolmogorov–Smirnov, ties randomised",
    "anderson_darling": "Anderson–Darling, requested parameters",
    "chi_square_pooled": "chi-square, cells pooled",
    "paper_ks": "paper: Kolmogorov–Smirnov",
    "paper_chi_square": "paper: chi-square, cells not pooled",
    "paper_anderson": "paper: Anderson–Darling, fitted parameters",
}
_SPLIT_TITLES = {
    UNSEEN: "Unseen parameters",
    OOD: "Unseen families",
    OOD_LISTS: "Unseen lists",
    TRAIN: "Training prompts",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """A value in a table: beside it an interval, below it the difference to the first run's, or a bar."""

    text: str
    interval: str = ""
    change: str = ""
    is_best: bool = False
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table: a cell for every run in every group of columns; a heading begins a group of rows."""

    title: str
    cells: Sequence[Cell]
    is_heading: bool = False


@dataclass(frozen=True)
class Table:
    """Groups of columns by their headings, each with a column for every run; a note on what tells the runs apart."""

    runs: Sequence[Run]
    groups: Sequence[str]
    rows: Sequence[Row]
    note: str = ""


def split_title(split: str) -> str:
    """A split's name for readers."""
    return _SPLIT_TITLES.get(split, split)


def number(value: float | int | None) -> str:
    """Three significant digits; powers of ten where they are many; counts whole; a dash for what does not exist."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    magnitude = int(exponent)
    if magnitude >= 5 or magnitude < -3:
        return f"{float(mantissa):.1f}·10{str(magnitude).translate(_SUPERSCRIPTS)}"
    return f"{value:,.{max(0, 2 - magnitude)}f}"


def percent(value: float | int | None) -> str:
    """A share in percent, with a decimal where it is not near whole."""
    if value is None:
        return "–"
    return f"{100 * value:.{1 if 0 < value < 1 else 0}f} %"


def shown(value: float | int | None, metric: Headline) -> str:
    """The value of a metric as text."""
    return percent(value) if metric.is_share else number(value)


def at(summaries: Iterable[Mapping[str, Any]], root: Sequence[str], metric: Headline) -> Headline:
    """A metric below a section; where that has none over strings, which were too many to list, the one over cells."""
    listed = replace(metric, path=(*root, *metric.path))
    cells = (name.replace("exact", "exact_cells") for name in metric.path)
    return listed if _is_known(summaries, listed) else replace(metric, path=(*root, *cells))


def cells_of(runs: Sequence[Run], metric: Headline, alike: Sequence[int]) -> list[Cell]:
    """A metric of every run, each but the first with its difference to the first, the best of those alike in bold."""
    values = [value_at(run.summary, metric.path) for run in runs]
    cells = []
    for index, (run, value) in enumerate(zip(runs, values, strict=True)):
        peers = {v for v, group in zip(values, alike, strict=True) if group == alike[index] and v is not None}
        is_best = len(peers) > 1 and metric.better and value == (max(peers) if metric.better > 0 else min(peers))
        change = ""
        if index and metric.better and value is not None and values[0] is not None:
            change = _difference(value - values[0], metric)
        intervals = section_at(run.summary, (*metric.path[:-2], "intervals")) if "sampled" in metric.path else {}
        interval = ", ".join(shown(end, metric) for end in intervals.get(metric.path[-1], ()))
        bar = value if "families" in metric.path and metric.path[-1] == "total_variation" else None
        cells.append(Cell(shown(value, metric), interval, change, bool(is_best), bar))
    return cells


def table_of(
    runs: Sequence[Run], rows: Mapping[str, Sequence[Headline]], groups: Sequence[str] = ("",), *, split: str = ""
) -> Table | None:
    """A table of metrics; rows and groups of columns in which no run has any are left out, None if no row is left.

    A row is by its title the metric in each group, where every run has a column; `split` is the one they are all of.
    """
    summaries = [run.summary for run in runs]
    kept = [any(_is_known(summaries, metric) for metric in column) for column in zip(*rows.values(), strict=True)]
    alike, note = measured_alike(runs, split)
    lines = [
        Row(title, [cell for metric in itertools.compress(metrics, kept) for cell in cells_of(runs, metric, alike)])
        for title, metrics in rows.items()
        if any(_is_known(summaries, metric) for metric in metrics)
    ]
    return Table(runs, list(itertools.compress(groups, kept)), lines, note) if lines else None


def metric_table(runs: Sequence[Run], metrics: Iterable[Headline]) -> Table | None:
    """A row per metric."""
    return table_of(runs, {metric.title: [metric] for metric in metrics})


def split_table(runs: Sequence[Run], split: str) -> Table | None:
    """What the structured suite measures in a split, with medians and what an ideal sampler gets."""
    root = ("splits", split)
    rows = {
        metric.title: [
            replace(metric, path=(*root, *metric.path)),
            replace(metric, path=(*root, "medians", *metric.path), better=0),
            replace(metric, path=(*root, "ideal", metric.path[-1] if metric.path[0] == "sampled" else ""), better=0),
        ]
        for metric in METRICS
    }
    return table_of(runs, rows, ("", "median", "ideal sampler"), split=split)


def families_table(runs: Sequence[Run], split: str) -> Table | None:
    """The main metrics of every family of a split, with bars of the total variation."""
    root = ("splits", split, "families")
    metrics, summaries = [metric for metric in METRICS if metric.title in _OF_FAMILIES], [run.summary for run in runs]
    rows = {
        family.replace("_", " "): [at(summaries, (*root, family), metric) for metric in metrics]
        for family in dict.fromkeys(name for summary in summaries for name in section_at(summary, root))
    }
    return table_of(runs, rows, [metric.title for metric in metrics], split=split)


def tests_table(runs: Sequence[Run], splits: Sequence[str]) -> Table | None:
    """How often each test of goodness of fit rejects the samples of a prompt, by split and run."""
    rows = {
        title: [Headline(title, ("splits", s, "tests", name, "rejected_at_5pct"), 0, is_share=True) for s in splits]
        for name, title in _TESTS.items()
    }
    return table_of(runs, rows, [split_title(split) for split in splits])


def numbers_table(runs: Sequence[Run]) -> Table | None:
    """Every number of the summaries."""
    paths = dict.fromkeys(path for run in runs for path in flat(run.summary) if path[0] != "settings")
    return metric_table(runs, [Headline(" ".join(path), path, 0) for path in paths])


def _is_known(summaries: Iterable[Mapping[str, Any]], metric: Headline) -> bool:
    return any(value_at(summary, metric.path) is not None for summary in summaries)


def _difference(value: float | int, metric: Headline) -> str:
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return f"{sign}{100 * abs(value):.1f} points" if metric.is_share else f"{sign}{number(abs(value))}"
