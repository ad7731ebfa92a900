"""`report.html`: one self-contained page about a run, from the files in its directory."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from cft_jax.common.files import write_atomically
from cft_jax.common.writer import read_metrics
from cft_jax.distributions.splits import OOD, TRAIN, UNSEEN
from cft_jax.evaluate.report import plots
from cft_jax.evaluate.report.panels import choose_panels, figure_key
from cft_jax.evaluate.report.side_by_side import Run
from cft_jax.evaluate.report.suite_sections import suite_section
from cft_jax.evaluate.report.tables import (
    cards,
    config_table,
    definitions,
    families_table,
    number,
    sampled_table,
    split_table,
    split_title,
    tests_table,
    total_variation,
)
from cft_jax.evaluate.results import read_summary
from cft_jax.evaluate.store import Record
from cft_jax.evaluate.suites.registry import SUITES
from cft_jax.evaluate.suites.structured.suite import SUITE, read_results

STAGES = ("before", "after")
_MAX_PANELS = 10
# The split whose figures come first: what the method is for.
_SPLIT_ORDER = (UNSEEN, OOD, TRAIN)


@dataclass(frozen=True)
class Results:
    """What one structured evaluation left: `summary.json` and the records of its prompts."""

    summary: Mapping[str, Any]
    records: Sequence[Record]


@dataclass(frozen=True)
class ReportData:
    """All that a report shows.

    Attributes:
      name: of the run.
      results: evaluations by stage, `before` and `after`; either may be missing.
      metrics: the rows of `metrics.jsonl`.
      run: the contents of `config.json`.
      others: what other suites left, named by stage.
    """

    name: str
    results: Mapping[str, Results]
    metrics: Sequence[Mapping[str, Any]]
    run: Mapping[str, Any]
    others: Sequence[Run] = ()


def write_report(workdir: Path) -> Path:
    """Writes `report.html` from what the run's directory holds by now; returns its path.

    Raises:
      UserError: one of the files is damaged.
    """
    path = workdir / "report.html"
    write_atomically(path, render_report(read_report_data(workdir)))
    return path


def read_report_data(workdir: Path) -> ReportData:
    """Reads `config.json`, `metrics.jsonl` and the structured evaluations of a run; what is missing is left out."""
    found = {stage: read_results(workdir / "eval" / SUITE / stage) for stage in STAGES}
    results = {stage: Results(*result) for stage, result in found.items() if result is not None}
    config = workdir / "config.json"
    run = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    summaries = [(stage, read_summary(workdir / "eval" / suite / stage)) for suite in SUITES for stage in STAGES]
    others = [Run(stage, summary, []) for stage, summary in summaries if summary and summary["suite"] != SUITE]
    return ReportData(workdir.resolve().name, results, read_metrics(workdir / "metrics.jsonl"), run, others)


def render_report(data: ReportData) -> str:
    """The page. The same data give the same bytes."""
    sections = [_headline(data), _gallery(data), _families(data), _curves(data), _samples(data)]
    suites = dict.fromkeys(run.summary["suite"] for run in data.others)
    sections += [suite_section(data.others, suite, plots.STAGE_STYLES) for suite in suites]
    sections.append(_appendix(data))
    template = Template(
        resources.files("cft_jax.evaluate.report").joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    return template.substitute(
        title=html.escape(f"{data.name}: calibration fine-tuning"),
        heading="Does the model sample what it is asked for?",
        lede=_lede(data),
        body="\n".join(section for section in sections if section),
        footer=_footer(data),
    )


def _splits(data: ReportData) -> list[str]:
    present = {name for result in data.results.values() for name in result.summary["splits"]}
    return sorted(present, key=lambda name: (_SPLIT_ORDER.index(name) if name in _SPLIT_ORDER else 9, name))


def _of_split(data: ReportData, split: str) -> dict[str, Mapping[str, Any]]:
    """The figures of a split by stage."""
    return {
        stage: result.summary["splits"][split]
        for stage, result in data.results.items()
        if split in result.summary["splits"]
    }


def _lede(data: ReportData) -> str:
    config = data.run.get("config", {})
    model = config.get("model", {})
    name = (
        "A small model trained from scratch" if model.get("scratch", {}).get("enabled") else model.get("checkpoint", "")
    )
    prompts = max(
        (sum(s["num_prompts"] for s in r.summary["splits"].values()) for r in data.results.values()), default=0
    )
    asked = f" on {prompts:,} prompts" if prompts else ""
    return (
        f"<b>{html.escape(name or data.name)}</b>, asked in words for one draw from a distribution: how closely its "
        f"answers follow that distribution{asked}, before and after training."
    )


def _headline(data: ReportData) -> str:
    splits = _splits(data)
    if not splits:
        return "" if data.others else '<p class="note">No evaluation has finished yet.</p>'
    first = splits[0]
    parts = [cards(_of_split(data, first), split_title(first))]
    if len(splits) > 1:
        parts.append(split_table({split: _of_split(data, split) for split in splits}))
    return "\n".join(parts)


def _gallery(data: ReportData) -> str:
    records = {stage: result.records for stage, result in data.results.items()}
    panels = choose_panels(records, plots.STAGE_STYLES, _splits(data), _MAX_PANELS)
    if not panels:
        return ""
    figures = []
    for index, (key, panel) in enumerate(panels):
        description = f"{panel.title} {panel.subtitle}: target and model"
        image = plots.svg(plots.panel_figure(panel), f"panel{index}", description)
        caption = f"<span><b>{html.escape(panel.title)}</b>{html.escape(panel.subtitle)}</span>"
        caption += f'<span class="figures">{_panel_figures(records, key)}</span>'
        figures.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
    unseen = "" if TRAIN in _splits(data) else ", on prompts it was not trained on"
    return (
        "<h2>What the model would answer</h2>"
        '<p class="note">The whole distribution of the model over the answers, computed exactly, not sampled'
        f"{unseen}. Left, probabilities or densities; right, their cumulative sums, which end at "
        "the share of answers that are possible at all.</p>"
        f"{_legend(data)}"
        f'<div class="gallery">{"".join(figures)}</div>'
    )


def _legend(data: ReportData) -> str:
    entries = ['<span class="t">target</span>']
    entries += [f'<span class="{stage[0]}">{stage} training</span>' for stage in STAGES if stage in data.results]
    return f'<div class="legend">{"".join(entries)}</div>'


def _panel_figures(records: Mapping[str, Sequence[Record]], key: tuple[str, str]) -> str:
    values = [
        f'<span class="{stage}">{number(total_variation(record))}</span>'
        for stage, rows in records.items()
        for record in rows
        if figure_key(record) == key
    ]
    return f"total variation {' → '.join(values)}"


def _families(data: ReportData) -> str:
    splits = {split: _of_split(data, split) for split in _splits(data)}
    if not any("exact" in figures for stages in splits.values() for figures in stages.values()):
        return ""
    return (
        "<h2>By family</h2>"
        '<p class="note">KL from the target to the model in nats; total variation is the share of probability that '
        "would have to move; Wasserstein-1 in the units of the values; valid, the share of sampled answers that read "
        "as a number.</p>"
        f"{families_table(splits)}"
    )


def _curves(data: ReportData) -> str:
    figures = []
    for split in _splits(data)[:1]:
        curves = {stage: s["calibration"] for stage, s in _of_split(data, split).items() if "calibration" in s}
        if curves:
            image = plots.svg(
                plots.calibration_figure(curves, plots.STAGE_STYLES),
                "calibration",
                "calibration before and after training",
            )
            caption = f"<span><b>Calibration</b>{html.escape(split_title(split))}</span>"
            figures.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
    rows = [row for row in data.metrics if row.get("loss") is not None]
    if len(rows) > 1:
        image = plots.svg(
            plots.loss_figure([r["step"] for r in rows], [r["loss"] for r in rows]), "loss", "training loss"
        )
        caption = f"<span><b>Training loss</b>{rows[-1]['step']:,} steps</span>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
    if not figures:
        return ""
    note = (
        "Calibration: the values below the target's 10 % point should get 10 % of the model's probability, and so on "
        "along the diagonal. Lines are averages over families, bands hold 80 % of the prompts."
    )
    return f'<h2>Calibration and training</h2><p class="note">{note}</p><div class="pair">{"".join(figures)}</div>'


def _samples(data: ReportData) -> str:
    splits = {split: _of_split(data, split) for split in _splits(data)}
    tables = "".join(sampled_table(split_title(split), stages) for split, stages in splits.items())
    if not tables:
        return ""
    return (
        "<h2>Sampled answers</h2>"
        '<p class="note">The paper\'s figures, averaged over families with equal weight, with 95 % bootstrap '
        "intervals. One absurd number can rule an average, hence the medians. Samples have noise of their own: the "
        "last column is what a perfect sampler gets with as many draws.</p>"
        f"{tables}{tests_table({split_title(split): stages for split, stages in splits.items()})}"
    )


def _appendix(data: ReportData) -> str:
    left_out = _left_out(data)
    return (
        "<h2>Details</h2>"
        f"<details><summary>What the figures mean</summary>{definitions()}</details>"
        f"<details><summary>What was left out of averages</summary>{left_out}</details>"
        f"<details><summary>Configuration</summary>{config_table(data.run)}</details>"
    )


def _left_out(data: ReportData) -> str:
    lines = [
        f"<li>{html.escape(split_title(split))}, {stage}: {section} <code>{name}</code> of {count} prompts</li>"
        for split in _splits(data)
        for stage, figures in _of_split(data, split).items()
        for section, counts in figures.get("left_out", {}).items()
        for name, count in counts.items()
    ]
    lines += [
        f"<li>{html.escape(split_title(split))}, {stage}: {count} answers that only the paper's parser takes "
        f"({html.escape(kind.replace('_', ' '))})</li>"
        for split in _splits(data)
        for stage, figures in _of_split(data, split).items()
        for kind, count in figures.get("lenient_parses", {}).items()
    ]
    why = (
        "<p class='note'>A figure that does not exist (the Cauchy has no mean) is left out, never counted as zero.</p>"
    )
    return why + (f"<ul class='note'>{''.join(lines)}</ul>" if lines else "<p class='note'>Nothing was left out.</p>")


def _footer(data: ReportData) -> str:
    revision, devices = data.run.get("revision", ""), data.run.get("devices", "")
    weights = ", ".join(f"{stage} {result.summary['fingerprint']}" for stage, result in data.results.items())
    parts = ["Calibration Fine-Tuning, arXiv 2605.11845", f"code {revision[:12]}" if revision else "", devices]
    parts.append(f"results {weights}" if weights else "")
    valid = [html.escape(str(part)) for part in parts if part]
    return " · ".join(valid)
