"""Evaluations side by side, as one self-contained page: tables with deltas, and plots."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.evaluate.report import plots
from cft_jax.evaluate.report.overview import overview_table
from cft_jax.evaluate.report.panels import choose_panels
from cft_jax.evaluate.report.side_by_side import Run, head_row, legend, table, value_cells
from cft_jax.evaluate.report.suite_sections import suite_section
from cft_jax.evaluate.report.tables import split_title
from cft_jax.evaluate.results import ALL, STORE, SUMMARY, read_summary
from cft_jax.evaluate.store import read_records
from cft_jax.evaluate.suites.registry import SUITES
from cft_jax.evaluate.suites.structured.suite import SUITE

_STAGES = ("before", "after")
_MAX_PANELS = 8
# Section, name, heading, whether it is a share, and which way is better: -1 for less, 1 for more.
_FIGURES = (
    ("exact", "kl", "exact KL, nats", False, -1),
    ("exact", "total_variation", "total variation", False, -1),
    ("exact", "support_mass", "mass on the support", True, 1),
    ("exact", "wasserstein_1", "Wasserstein-1, exact", False, -1),
    ("exact_scaled", "wasserstein_1_over_iqr", "Wasserstein-1 / IQR, exact", False, -1),
    ("exact_cells", "total_variation", "total variation, cells", False, -1),
    ("exact_cells", "wasserstein_1", "Wasserstein-1, cells", False, -1),
    ("path", "logit_kl", "path KL of the paper, nats", False, -1),
    ("sampled", "valid_rate", "valid answers", True, 1),
    ("sampled", "support_violation_rate", "outside the support", True, -1),
    ("sampled", "mean_error", "error of the mean", False, -1),
    ("sampled", "variance_error", "error of the variance", False, -1),
    ("sampled", "wasserstein_1", "Wasserstein-1, sampled", False, -1),
)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The evaluations in these directories, in order.

    Args:
      paths: directories of evaluations, or of runs of the main job, which hold one before and one after training.

    Raises:
      UserError: a directory holds no evaluation, or a damaged one.
    """
    by_path = [_runs_of(path) for path in paths]
    names = [(run.name, run.summary["suite"]) for runs in by_path for run in runs]
    repeated = {name for name, suite in names if names.count((name, suite)) > 1}
    # Directories of the same name and suite are told apart by their place in the list.
    return [
        replace(run, name=f"{run.name} ({index + 1})") if run.name in repeated else run
        for index, runs in enumerate(by_path)
        for run in runs
    ]


def render_comparison(runs: Sequence[Run]) -> str:
    """The page; the first run is the base of all deltas. The same runs give the same bytes."""
    models = list(dict.fromkeys(run.name for run in runs))
    styles = {name: index if len(models) > 1 else 1 for index, name in enumerate(models)}
    sections = [overview_table(runs, styles)]
    structured = [run for run in runs if run.summary["suite"] == SUITE and "missing" not in run.summary]
    if structured:
        splits = list(dict.fromkeys(split for run in structured for split in run.summary["splits"]))
        sections += [_split_table(structured, split, styles) for split in splits]
        sections += [_gallery(structured, splits, styles), _calibration(structured, splits, styles)]
        sections += [_family_table(structured, split, styles) for split in splits]
    others = dict.fromkeys(run.summary["suite"] for run in runs if run.summary["suite"] != SUITE)
    sections += [suite_section(runs, suite, styles) for suite in others]
    template = Template(resources.files("cft_jax.evaluate.report").joinpath("templates/report.html").read_text("utf-8"))
    names = ", ".join(f"<b>{html.escape(name)}</b>" for name in models)
    differs = f", differences to {html.escape(models[0])}" if len(models) > 1 else ""
    measured = dict.fromkeys(f"{run.name}: {run.summary.get('checkpoint', '')}" for run in runs)
    return template.substitute(
        title="Calibration: evaluations side by side" if len(models) > 1 else html.escape(f"{models[0]}: calibration"),
        heading=_heading(runs),
        lede=f"{names}{differs}.",
        body="\n".join(section for section in sections if section),
        footer=" · ".join(html.escape(text) for text in measured if not text.endswith(": ")),
    )


def _heading(runs: Sequence[Run]) -> str:
    suites = {run.summary["suite"] for run in runs}
    if suites == {SUITE}:
        return "How closely do answers follow the distribution?"
    return (
        f"Evaluation: {SUITES[suites.pop()].title}"
        if len(suites) == 1
        else "Does the skill transfer, and what does it cost?"
    )


def _runs_of(path: Path) -> list[Run]:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the --workdir of an evaluation or of a run")
    whole = path.resolve()
    name = whole.name
    if name in _STAGES and whole.parent.parent.name == "eval":
        name = f"{whole.parents[2].name} {name}"
    stages = [(f"{name} {stage}", path / "eval" / suite / stage) for stage in _STAGES for suite in SUITES]
    present = [(title, place) for title, place in stages if (place / SUMMARY).exists()]
    if present:
        return [_read(title, place) for title, place in present]
    whole_run = _read(name, path)
    if whole_run.summary["suite"] != ALL:
        return [whole_run]
    return [
        Run(name, {"suite": suite, **found}, [])
        if "missing" in found
        else _read(name, path / suite, incomplete=found.get("incomplete", ""))
        for suite, found in whole_run.summary["suites"].items()
    ]


def _read(name: str, path: Path, *, incomplete: str = "") -> Run:
    summary = read_summary(path)
    if summary is None:
        raise UserError(f"{path} holds no finished evaluation (no summary.json); run cft_jax.evaluate first")
    if incomplete:
        summary["incomplete"] = incomplete
    return Run(name, summary, read_records(path / STORE, summary["fingerprint"]) if summary["suite"] == SUITE else [])


def _split_table(runs: Sequence[Run], split: str, styles: Mapping[str, int]) -> str:
    rows = ""
    for section, name, heading, is_share, better in _FIGURES:
        values = [_of(run, split).get(section, {}).get(name) for run in runs]
        if any(value is not None for value in values):
            intervals = [
                _of(run, split).get("intervals", {}).get(name) if section == "sampled" else None for run in runs
            ]
            rows += f"<tr><td>{heading}</td>{value_cells(values, is_share, better, intervals)}</tr>"
    if not rows:
        return ""
    # Averages over other prompts are other figures, so the numbers of prompts stand first.
    prompts = "".join(f"<td>{_of(run, split).get('num_prompts', 0):,}</td>" for run in runs)
    shown = table(head_row(runs, "", styles), f"<tr><td>prompts</td>{prompts}</tr>{rows}")
    return f"<h2>{html.escape(split_title(split))}</h2>{shown}"


def _family_table(runs: Sequence[Run], split: str, styles: Mapping[str, int]) -> str:
    families = list(dict.fromkeys(family for run in runs for family in _of(run, split).get("families", {})))
    rows = ""
    for family in families:
        figures = [_of(run, split).get("families", {}).get(family, {}) for run in runs]
        values = [f.get("exact", {}).get("total_variation", _cell_variation(f)) for f in figures]
        if any(value is not None for value in values):
            cells = value_cells(values, False, -1)
            rows += f"<tr><td>{html.escape(family.replace('_', ' '))}</td>{cells}</tr>"
    if not rows:
        return ""
    title = f"Total variation by family, {split_title(split).lower()}"
    return f"<h2>{html.escape(title)}</h2>" + table(head_row(runs, "family", styles), rows)


def _cell_variation(figures: Mapping[str, Any]) -> float | None:
    return figures.get("exact_cells", {}).get("total_variation")


def _gallery(runs: Sequence[Run], splits: Sequence[str], styles: Mapping[str, int]) -> str:
    panels = choose_panels({run.name: run.records for run in runs}, styles, splits, _MAX_PANELS)
    figures = ""
    for index, (_, panel) in enumerate(panels):
        description = f"{panel.title} {panel.subtitle}: target and {', '.join(panel.models)}"
        caption = f"<span><b>{html.escape(panel.title)}</b>{html.escape(panel.subtitle)}</span>"
        image = plots.svg(plots.panel_figure(panel), f"panel{index}", description)
        figures += f"<figure><figcaption>{caption}</figcaption>{image}</figure>"
    if not figures:
        return ""
    return (
        f'<h2>What the models would answer</h2>{legend(runs, styles, target=True)}<div class="gallery">{figures}</div>'
    )


def _calibration(runs: Sequence[Run], splits: Sequence[str], styles: Mapping[str, int]) -> str:
    figures = ""
    for split in splits:
        curves = {run.name: _of(run, split)["calibration"] for run in runs if "calibration" in _of(run, split)}
        if curves:
            identity = "calibration-" + re.sub(r"\W", "-", split)
            image = plots.svg(plots.calibration_figure(curves, styles), identity, f"calibration, {split_title(split)}")
            caption = f"<span><b>{html.escape(split_title(split))}</b></span>"
            figures += f"<figure><figcaption>{caption}</figcaption>{image}</figure>"
    return (
        f'<h2>Calibration</h2>{legend(runs, styles, target=True)}<div class="gallery">{figures}</div>'
        if figures
        else ""
    )


def _of(run: Run, split: str) -> Mapping[str, Any]:
    return run.summary["splits"].get(split, {})
