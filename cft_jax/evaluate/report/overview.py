"""The headline metrics of all suites: as `summary.json` has them, and as a table of a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from cft_jax.evaluate.report.runs import Run, flat, section_at, value_at
from cft_jax.evaluate.report.tables import Cell, Row, Table, metric_table
from cft_jax.evaluate.results import ALL
from cft_jax.evaluate.suites.protocol import Headline
from cft_jax.evaluate.suites.registry import SUITES


def suites_of(runs: Sequence[Run]) -> list[str]:
    """The suites of these runs in the registry's order, unknown ones last."""
    names = dict.fromkeys(run.summary["suite"] for run in runs)
    return sorted(names, key=[*SUITES, *names].index)


def suite_title(suite: str) -> str:
    """A suite's name for readers."""
    return SUITES[suite].title if suite in SUITES else suite


def headlines_of(suite: str, summaries: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """A suite's headlines: fixed ones, and those of the lm-eval tasks that somebody named."""
    named = {name for summary in summaries for name in section_at(summary, ("settings",)).get("tasks", ())}
    of_tasks = task_headlines(summaries)
    # A tag stands for tasks of other names, so that all there are count.
    fixed = SUITES[suite].headlines if suite in SUITES else ()
    return [*fixed, *([task for task in of_tasks if task.path[2] in named] or of_tasks)]


def task_headlines(summaries: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """A headline for every metric of every lm-eval task in these summaries."""
    headlines: dict[tuple[str, ...], Headline] = {}
    for summary in summaries:
        section = section_at(summary, ("lm_eval",))
        for task, key in flat(section.get("tasks", {})):
            metric, _, variant = key.partition(",")
            higher = section["higher_is_better"].get(task, {}).get(metric)
            if higher is not None and not metric.endswith("_stderr"):
                title = ", ".join([task, metric] + ([] if variant in ("", "none") else [variant]))
                is_share = metric.startswith(("acc", "exact_match"))
                headlines[task, key] = Headline(title, ("lm_eval", "tasks", task, key), 1 if higher else -1, is_share)
    return list(headlines.values())


def headline_metrics(summary: Mapping[str, Any]) -> dict[str, float | int]:
    """A suite's headline metrics by title; those that were not computed are absent."""
    headlines = headlines_of(summary["suite"], [summary])
    values = ((headline.title, value_at(summary, headline.path)) for headline in headlines)
    return {title: value for title, value in values if value is not None}


def all_summary(summaries: Mapping[str, Mapping[str, Any]], *, checkpoint: str) -> dict[str, Any]:
    """The contents of `summary.json` over several suites: by suite its headline metrics, or why they are missing."""
    suites: dict[str, dict[str, Any]] = {}
    for name, summary in summaries.items():
        lacking = {key: summary[key] for key in ("missing", "incomplete") if key in summary}
        suites[name] = lacking if "missing" in lacking else {"figures": headline_metrics(summary), **lacking}
    return {"suite": ALL, "checkpoint": checkpoint, "suites": suites}


def overview_table(runs: Sequence[Run]) -> Table | None:
    """A column per model, rows by suite; None for a single suite."""
    suites, models = suites_of(runs), models_of(runs)
    if len(suites) < 2:
        return None
    by_name = {(run.name, run.summary["suite"]): run for run in runs}
    rows: list[Row] = []
    notes = []
    for suite in suites:
        of_suite = [by_name.get((model.name, suite), Run(model.name, {}, style=model.style)) for model in models]
        rows.append(Row(suite_title(suite), [Cell(_status(run)) for run in of_suite], is_heading=True))
        summaries = [run.summary for run in of_suite if "missing" not in run.summary]
        if table := metric_table(of_suite, headlines_of(suite, summaries)):
            rows += table.rows
            notes += [f"{suite_title(suite)}: {table.note}"] if table.note else []
    return Table(models, [""], rows, " ".join(notes))


def models_of(runs: Sequence[Run]) -> list[Run]:
    """The first run of every model, which stands for it."""
    return list({run.name: run for run in reversed(runs)}.values())[::-1]


def _status(run: Run) -> str:
    return next((key for key in ("missing", "incomplete") if key in run.summary), "" if run.summary else "not run")
