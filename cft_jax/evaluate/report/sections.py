"""What a page has: its tables, its plots and the words that depend on the runs, for the template `page.html`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from cft_jax.distributions.splits import TEST_SPLITS, TRAIN
from cft_jax.evaluate.report import overview, plots, tables
from cft_jax.evaluate.report.conditions import measured_alike
from cft_jax.evaluate.report.gallery import gallery_of
from cft_jax.evaluate.report.overview import models_of, suite_title, suites_of
from cft_jax.evaluate.report.panels import choose_panels, record_key
from cft_jax.evaluate.report.runs import Run, Training, flat, section_at, value_at
from cft_jax.evaluate.report.tables import METRICS, at, number, shown, split_title
from cft_jax.evaluate.suites.protocol import Headline
from cft_jax.evaluate.suites.structured.suite import SUITE

_MAX_PANELS = 10
# The split whose metrics come first: what the method is for.
_SPLIT_ORDER = (*TEST_SPLITS, TRAIN)
_CARDS = ("exact KL, nats", "total variation", "valid answers", "Wasserstein-1 / IQR, exact")
# Metrics of a suite beside its headlines. One whose path has a * stands for those of all names there are in its stead,
# and has a plot with bars of them.
_FURTHER: Mapping[str, Sequence[Headline]] = {
    "open_random": (
        Headline("prompts", ("num_prompts",), 0),
        Headline("samples per prompt", ("settings", "num_samples"), 0),
        Headline("empty answers", ("mean_empty_rate",), -1, is_share=True),
        Headline("next tokens that hold this probability, median", ("median_support_sizes", "*"), 1),
    ),
    "mcq": (
        Headline("questions", ("num_samples",), 0),
        Headline("chi-square, 3 degrees of freedom", ("chi_square_statistic",), -1),
        Headline("its p-value", ("chi_square_pvalue",), 0),
        Headline("largest deviation from uniform", ("max_abs_deviation_from_uniform",), -1),
        Headline("right answers", ("freq_*",), 0, is_share=True),
    ),
    "noveltybench": (
        Headline("prompts", ("overall", "num_prompts"), 0),
        Headline("distinct answers", ("splits", "*", "mean_distinct"), 1),
        Headline("utility", ("splits", "*", "mean_utility"), 1),
    ),
    "perplexity": (
        Headline("documents", ("total", "num_documents"), 0),
        Headline("perplexity, with BOS, every token", ("total", "covering", "perplexity"), -1),
        Headline("bits per byte, the paper's", ("total", "paper", "bits_per_byte"), -1),
        Headline("bits per byte", ("slices", "*", "covering", "bits_per_byte"), -1),
    ),
    "retention": (
        Headline("accuracy", ("tinybenchmarks", "tasks", "tiny_*", "accuracy"), 1, is_share=True),
        Headline("gp-IRT", ("tinybenchmarks", "tasks", "tiny_*", "gpirt"), 1, is_share=True),
    ),
}


def page_sections(runs: Sequence[Run], training: Training | None) -> dict[str, Any]:
    """Everything that the template shows, by the names it has there."""
    measured = [run for run in runs if "missing" not in run.summary]
    structured = [run for run in measured if run.summary["suite"] == SUITE]
    names = {name for run in structured for name in run.summary["splits"]}
    splits = sorted(names, key=[*_SPLIT_ORDER, *sorted(names)].index)
    sizes = [sum(split["num_prompts"] for split in run.summary["splits"].values()) for run in structured]
    return {
        "training": training,
        "trained": _trained(training) if training is not None else "",
        "models": models_of(runs),
        "heading": _heading(suites_of(runs), training),
        "num_prompts": max(sizes, default=0),
        "missing": _missing(runs),
        "overview": overview.overview_table(runs),
        "cards": list(_cards(structured, splits[0])) if splits and len(structured) <= 2 else [],
        "split_tables": {split: tables.split_table(structured, split) for split in splits},
        "panels": _panels(structured, splits),
        "family_tables": {split: tables.families_table(structured, split) for split in splits},
        "curves": _curves(structured, splits, training),
        "tests": tables.tests_table(structured, splits),
        "gallery": gallery_of(structured, splits),
        "suites": [_suite(measured, suite) for suite in suites_of(measured) if suite != SUITE],
        "left_out": [line for run in structured for line in _left_out(run, splits)],
        "configuration": {".".join(path): value for path, value in flat(training.config).items()} if training else {},
        "footer": _footer(runs, training),
    }


def _heading(suites: Sequence[str], training: Training | None) -> str:
    if training is not None:
        return "Does the model sample what it is asked for?"
    if suites == [SUITE]:
        return "How closely do answers follow the distribution?"
    if len(suites) == 1:
        return f"Evaluation: {suite_title(suites[0])}"
    return "Does the skill transfer, and what does it cost?"


def _trained(training: Training) -> str:
    model = section_at(training.config, ("config", "model"))
    if model.get("scratch", {}).get("enabled"):
        return "A small model trained from scratch"
    if model.get("base"):
        return f"A model made by {model['base']}"
    return model.get("checkpoint") or training.name


def _footer(runs: Sequence[Run], training: Training | None) -> list[str]:
    """What was measured, by which code, on which devices."""
    config = training.config if training else {}
    code = f"code {config['revision'][:12]}" if config.get("revision") else ""
    about = [[run.name, run.summary.get("checkpoint"), run.summary.get("fingerprint")] for run in models_of(runs)]
    parts = ["Calibration Fine-Tuning, arXiv 2605.11845", code, config.get("devices", "")]
    return [str(part) for part in (*parts, *(": ".join(filter(None, known)) for known in about)) if part]


def _missing(runs: Sequence[Run]) -> dict[tuple[str, str], list[str]]:
    """The models that lack something, by the title of the suite and the reason."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for key in ("missing", "incomplete"):
            if key in run.summary:
                lacking.setdefault((suite_title(run.summary["suite"]), run.summary[key]), []).append(run.name)
    return lacking


def _cards(runs: Sequence[Run], split: str) -> Iterator[dict[str, str]]:
    """The headline metrics of a split: what they are, and of runs measured alike what they were, how much is gone."""
    runs = runs if not measured_alike(runs, split)[1] else runs[-1:]
    for metric in (metric for metric in METRICS if metric.title in _CARDS):
        path = at([run.summary for run in runs], ("splits", split), metric).path
        was, now = ([None] + [value_at(run.summary, path) for run in runs])[-2:]
        if now is None:
            continue
        card = {"title": f"{metric.title}, {split_title(split).lower()}", "value": shown(now, metric)}
        if was is not None:
            card["was"] = shown(was, metric)
            # Only said where most of it is gone.
            if metric.better < 0 and was > 0 and now <= 0.5 * was:
                card["change"] = f"−{100 * (1 - now / was):.{1 if now < 0.1 * was else 0}f} %"
        yield card


def _panels(runs: Sequence[Run], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Plots of prompts, with the total variation by a model's style."""
    gallery = []
    variation = next(metric for metric in METRICS if metric.title == "total variation")
    for key, panel in choose_panels(runs, splits, _MAX_PANELS):
        of_prompt = {run.style: record for run in runs for record in run.records if record_key(record) == key}
        path = at(of_prompt.values(), (), variation).path
        variations = {style: number(value_at(record, path)) for style, record in of_prompt.items()}
        gallery.append(_plot(panel.title, plots.panel_figure(panel), panel.subtitle) | {"variations": variations})
    return gallery


def _curves(runs: Sequence[Run], splits: Sequence[str], training: Training | None) -> list[dict[str, Any]]:
    """Calibration by split, and the loss of the training."""
    gallery = []
    for split in splits:
        sections = {run.style: section_at(run.summary, ("splits", split, "calibration")) for run in runs}
        if curves := {style: section for style, section in sections.items() if section}:
            gallery.append(_plot("Calibration", plots.calibration_figure(curves), split_title(split)))
    rows = [row for row in training.metrics if row.get("loss") is not None] if training else []
    if len(rows) > 1:
        figure = plots.loss_figure([row["step"] for row in rows], [row["loss"] for row in rows])
        gallery.append(_plot("Training loss", figure, f"{rows[-1]['step']:,} steps"))
    return gallery


def _left_out(run: Run, splits: Sequence[str]) -> Iterator[str]:
    for split in splits:
        where = f"{split_title(split)}, {run.name}"
        for path, count in flat(section_at(run.summary, ("splits", split, "left_out"))).items():
            yield f"{where}: {' '.join(path)} of {count} prompts"
        for kind, count in section_at(run.summary, ("splits", split, "lenient_parses")).items():
            yield f"{where}: {count} answers that only the paper's parser takes ({kind.replace('_', ' ')})"


def _suite(measured: Sequence[Run], suite: str) -> dict[str, Any]:
    """The section of a suite beside structured sampling: headlines and further metrics, bars, every number."""
    runs = [run for run in measured if run.summary["suite"] == suite]
    summaries = [run.summary for run in runs]
    headlines = overview.headlines_of(suite, summaries)
    further = {metric: _expanded(metric, summaries) for metric in _FURTHER.get(suite, ())}
    # Tasks in a group come after the groups that were asked for.
    metrics = [*headlines, *overview.task_headlines(summaries), *itertools.chain(*further.values())]
    bars = {metric.title: group for metric, group in further.items() if any("*" in name for name in metric.path)}
    bars["lm-eval"] = [headline for headline in headlines if headline.path[0] == "lm_eval" and headline.is_share]
    gallery = []
    for title, group in bars.items():
        of_runs = ((run.style, [value_at(run.summary, metric.path) for metric in group]) for run in runs)
        # What a run lacks is NaN.
        heights = {style: np.array(values, np.float64) for style, values in of_runs if set(values) - {None}}
        if heights:
            labels = [metric.title.removeprefix(f"{title}, ") for metric in group]
            figure = plots.bars_figure(labels, heights, percent=group[0].is_share, uniform=suite == "mcq")
            gallery.append(_plot(title[0].upper() + title[1:], figure))
    unique = {metric.path: metric for metric in reversed(metrics)}.values()
    table = tables.metric_table(runs, list(unique)[::-1])
    return {"title": suite_title(suite), "table": table, "plots": gallery, "numbers": tables.numbers_table(runs)}


def _expanded(metric: Headline, summaries: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """What a metric stands for: itself, or one for every name that the summaries have in place of its path's *."""
    index = next((index for index, name in enumerate(metric.path) if name.endswith("*")), None)
    if index is None:
        return [metric]
    before, after, prefix = metric.path[:index], metric.path[index + 1 :], metric.path[index][:-1]
    names = dict.fromkeys(name for summary in summaries for name in section_at(summary, before))
    return [
        replace(metric, title=f"{metric.title}, {name.removeprefix(prefix)}", path=(*before, name, *after))
        for name in names
        if name.startswith(prefix)
    ]


def _plot(title: str, figure: Figure, subtitle: str = "") -> dict[str, Any]:
    # The title keeps the ids inside the image apart from those of the page's other images.
    image = plots.svg(figure, f"{title} {subtitle}", f"{title} {subtitle}".strip())
    return {"title": title, "subtitle": subtitle, "image": Markup(image)}
