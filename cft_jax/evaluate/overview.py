"""The headline figures of all suites in one table, a row for each model, as in the paper; why others are missing."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cft_jax.distributions.splits import OOD, UNSEEN
from cft_jax.evaluate.report_tables import number, percent
from cft_jax.evaluate.result_files import ALL
from cft_jax.evaluate.side_by_side import Run, figure_of, table
from cft_jax.suite_config import SUITES

TITLES = {
    "structured": "structured sampling",
    "open_random": "open random",
    "mcq": "multiple choice",
    "noveltybench": "NoveltyBench",
    "perplexity": "perplexity",
    "retention": "TinyBenchmarks",
}


@dataclass(frozen=True)
class Headline:
    """A figure worth a column.

    Attributes:
      suite: it belongs to.
      heading: of the column.
      path: of the figure in the suite's summary.
      is_share: shown in percent.
      better: -1 for less, 1 for more.
    """

    suite: str
    heading: str
    path: tuple[str, ...]
    is_share: bool
    better: int


HEADLINES = (
    Headline("structured", "KL, unseen parameters", ("splits", UNSEEN, "exact", "kl"), False, -1),
    Headline("structured", "W1, unseen parameters", ("splits", UNSEEN, "sampled", "wasserstein_1"), False, -1),
    Headline("structured", "KL, unseen families", ("splits", OOD, "exact", "kl"), False, -1),
    Headline("structured", "W1, unseen families", ("splits", OOD, "sampled", "wasserstein_1"), False, -1),
    Headline("structured", "valid", ("splits", UNSEEN, "sampled", "valid_rate"), True, 1),
    Headline("open_random", "unique answers", ("mean_num_unique",), False, 1),
    Headline("open_random", "unique fraction", ("mean_unique_fraction",), True, 1),
    Headline("open_random", "entropy, nats", ("mean_entropy",), False, 1),
    Headline("mcq", "total variation", ("tv_distance_from_uniform",), False, -1),
    Headline("mcq", "parsed", ("parse_rate",), True, 1),
    Headline("noveltybench", "distinct, curated", ("splits", "curated", "mean_distinct"), False, 1),
    Headline("noveltybench", "utility, curated", ("splits", "curated", "mean_utility"), False, 1),
    Headline("noveltybench", "distinct, WildChat", ("splits", "wildchat", "mean_distinct"), False, 1),
    Headline("noveltybench", "utility, WildChat", ("splits", "wildchat", "mean_utility"), False, 1),
    Headline("noveltybench", "distinct", ("overall", "mean_distinct"), False, 1),
    Headline("noveltybench", "utility", ("overall", "mean_utility"), False, 1),
    Headline("perplexity", "perplexity", ("total", "paper", "perplexity"), False, -1),
    Headline("perplexity", "bits per byte", ("total", "covering", "bits_per_byte"), False, -1),
    Headline("retention", "mean gp-IRT", ("tinybenchmarks", "aggregate", "mean_gpirt"), True, 1),
    Headline("retention", "mean accuracy", ("tinybenchmarks", "aggregate", "mean_accuracy"), True, 1),
)  # fmt: skip


def headline_figures(summary: Mapping[str, Any]) -> dict[str, float | int]:
    """A suite's headline figures by heading; those that were not computed are absent."""
    found = {h.heading: figure_of(summary, h.path) for h in HEADLINES if h.suite == summary["suite"]}
    return {heading: value for heading, value in found.items() if value is not None}


def all_summary(summaries: Mapping[str, Mapping[str, Any]], *, checkpoint: str) -> dict[str, Any]:
    """The contents of `summary.json` over several suites: by suite its headline figures, or why they are missing."""
    return {
        "suite": ALL,
        "checkpoint": checkpoint,
        "suites": {
            name: {"missing": summary["missing"]}
            if "missing" in summary
            else {"figures": headline_figures(summary)}
            | {key: summary[key] for key in ("incomplete",) if key in summary}
            for name, summary in summaries.items()
        },
    }


def overview_table(runs: Sequence[Run]) -> str:
    """One row per model, columns by suite; below it the reasons for what is missing. Empty for a single suite."""
    suites = [suite for suite in SUITES if any(run.summary["suite"] == suite for run in runs)]
    if len(suites) < 2:
        return ""
    models = list(dict.fromkeys(run.name for run in runs))
    of = {(run.name, run.summary["suite"]): run.summary for run in runs}
    columns = [h for h in HEADLINES if h.suite in suites and _shown(h, runs)]
    groups, heads = "", ""
    for suite in suites:
        members = [h for h in columns if h.suite == suite] or [None]
        groups += f'<th class="group" colspan="{len(members)}">{TITLES[suite]}</th>'
        heads += "".join(f"<th>{html.escape(h.heading) if h else ''}</th>" for h in members)
    rows = ""
    for model in models:
        cells = ""
        for suite in suites:
            members = [h for h in columns if h.suite == suite]
            summary = of.get((model, suite))
            if summary is None or "missing" in summary:
                word = "not run" if summary is None else "missing"
                cells += f'<td colspan="{max(len(members), 1)}">{word}</td>'
            else:
                cells += "".join(_cell(h, model, of, models) for h in members) or "<td>–</td>"
        rows += f"<tr><td>{html.escape(model)}</td>{cells}</tr>"
    reasons = "".join(
        f"<li>{html.escape(run.name)}, {TITLES[run.summary['suite']]}: {html.escape(run.summary[key])}</li>"
        for run in runs
        for key in ("missing", "incomplete")
        if key in run.summary
    )
    notes = f'<p class="note">Missing:</p><ul class="note">{reasons}</ul>' if reasons else ""
    first = '<th class="group"></th>'
    return f"<h2>All suites</h2>{table(f'<tr>{first}{groups}</tr><tr><th></th>{heads}</tr>', rows)}{notes}"


def _shown(headline: Headline, runs: Sequence[Run]) -> bool:
    return any(
        figure_of(run.summary, headline.path) is not None for run in runs if run.summary["suite"] == headline.suite
    )


def _cell(
    headline: Headline, model: str, of: Mapping[tuple[str, str], Mapping[str, Any]], models: Sequence[str]
) -> str:
    values = [figure_of(of.get((name, headline.suite), {}), headline.path) for name in models]
    known = [value for value in values if value is not None]
    value = values[models.index(model)]
    text = percent(value) if headline.is_share else number(value)
    best = (max(known) if headline.better > 0 else min(known)) if len(known) > 1 else None
    return f"<td><b>{text}</b></td>" if value is not None and value == best else f"<td>{text}</td>"
