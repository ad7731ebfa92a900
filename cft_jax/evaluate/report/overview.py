"""The headline figures of all suites in one table, and why some are missing."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from cft_jax.evaluate.report.side_by_side import Run, figure_of, head_row, table, value_cells
from cft_jax.evaluate.results import ALL
from cft_jax.evaluate.suites.protocol import Headline
from cft_jax.evaluate.suites.registry import SUITES


def headlines_of(suite: str, summaries: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """A suite's headlines: fixed ones, and those of the lm-eval tasks that somebody named."""
    named = {name for summary in summaries for name in summary.get("settings", {}).get("tasks", ())}
    of_tasks = task_headlines(summaries) if suite == "retention" else []
    # A tag stands for tasks of other names, so that all there are count.
    chosen = [headline for headline in of_tasks if headline.path[2] in named] or of_tasks
    return [*SUITES[suite].headlines, *chosen]


def task_headlines(summaries: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """A headline for every metric of every lm-eval task in these summaries."""
    found: dict[tuple[str, str], Headline] = {}
    for summary in summaries:
        section = summary.get("lm_eval", {"tasks": {}})
        for task, figures in section["tasks"].items():
            for key in figures:
                metric, _, chosen = key.partition(",")
                higher = section["higher_is_better"].get(task, {}).get(metric)
                if metric.endswith("_stderr") or higher is None:
                    continue
                title = ", ".join([task, metric] + ([] if chosen == "none" else [chosen]))
                is_share = metric.startswith(("acc", "exact_match"))
                path = ("lm_eval", "tasks", task, key)
                found[task, key] = Headline(title, path, 1 if higher else -1, is_share)
    return list(found.values())


def headline_figures(summary: Mapping[str, Any]) -> dict[str, float | int]:
    """A suite's headline figures by title; those that were not computed are absent."""
    found = {h.title: figure_of(summary, h.path) for h in headlines_of(summary["suite"], [summary])}
    return {title: value for title, value in found.items() if value is not None}


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


def overview_table(runs: Sequence[Run], styles: Mapping[str, int]) -> str:
    """A column per model, rows by suite; below it the reasons for what is missing. Empty for a single suite."""
    suites = [suite for suite in SUITES if any(run.summary["suite"] == suite for run in runs)]
    if len(suites) < 2:
        return ""
    of = {(run.name, run.summary["suite"]): run.summary for run in runs}
    # The first run of every model stands for it in the head.
    models = list({run.name: run for run in reversed(runs)}.values())[::-1]
    rows = "".join(_suite_rows(suite, [of.get((model.name, suite)) for model in models]) for suite in suites)
    return f"<h2>All suites</h2>{table(head_row(models, '', styles), rows)}{_reasons(runs)}"


def _suite_rows(suite: str, summaries: Sequence[Mapping[str, Any] | None]) -> str:
    there = [summary for summary in summaries if summary is not None and "missing" not in summary]
    notes = [
        "not run" if summary is None else next((key for key in ("missing", "incomplete") if key in summary), "")
        for summary in summaries
    ]
    cells = "".join(f'<td style="text-align:right">{note}</td>' for note in notes)
    rows = f'<tr class="head"><td>{SUITES[suite].title}</td>{cells}</tr>'
    for headline in headlines_of(suite, there):
        values = [figure_of(summary or {}, headline.path) for summary in summaries]
        if any(value is not None for value in values):
            shown = value_cells(values, headline.is_share, headline.better)
            rows += f"<tr><td>{html.escape(headline.title)}</td>{shown}</tr>"
    return rows


def _reasons(runs: Sequence[Run]) -> str:
    """Why something is missing, said once for all models that lack it."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for key in ("missing", "incomplete"):
            if key in run.summary:
                lacking.setdefault((run.summary["suite"], run.summary[key]), []).append(run.name)
    if not lacking:
        return ""
    items = "".join(
        f"<li><b>{SUITES[suite].title}</b> ({html.escape(', '.join(names))}): {html.escape(reason)}</li>"
        for (suite, reason), names in lacking.items()
    )
    return f'<p class="note">Missing:</p><ul class="note">{items}</ul>'
