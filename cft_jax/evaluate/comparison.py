"""Evaluations side by side, as one self-contained page: tables with deltas, and plots."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.evaluate import plots
from cft_jax.evaluate.panels import choose_panels
from cft_jax.evaluate.report_tables import number, percent, split_title
from cft_jax.evaluate.result_files import ALL, STORE, SUMMARY, read_summary
from cft_jax.evaluate.store import Record, read_records
from cft_jax.evaluate.structured import SUITE
from cft_jax.suite_config import SUITES

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


@dataclass(frozen=True)
class Run:
    """One evaluation: its name on the page, its `summary.json`, and the records of its prompts (structured only)."""

    name: str
    summary: Mapping[str, Any]
    records: Sequence[Record]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The evaluations in these directories, in order.

    Args:
      paths: directories of evaluations, or of runs of the main job, which hold one before and one after training.

    Raises:
      UserError: a directory holds no evaluation, or a damaged one.
    """
    found = [run for path in paths for run in _runs_of(path)]
    names = [(run.name, run.summary["suite"]) for run in found]
    repeated = {name for name, suite in names if names.count((name, suite)) > 1}
    # Directories of the same name are told apart by their place in the list.
    return [
        Run(f"{run.name} ({index + 1})" if run.name in repeated else run.name, run.summary, run.records)
        for index, run in enumerate(found)
    ]


def render_comparison(runs: Sequence[Run]) -> str:
    """The page; the first run is the base of all deltas. The same runs give the same bytes."""
    structured = [run for run in runs if run.summary["suite"] == SUITE]
    sections = []
    if structured:
        splits = list(dict.fromkeys(split for run in structured for split in run.summary["splits"]))
        sections += [_split_table(structured, split) for split in splits]
        sections += [_gallery(structured, splits), _calibration(structured, splits)]
        sections += [_family_table(structured, split) for split in splits]
    others = dict.fromkeys(run.summary["suite"] for run in runs if run.summary["suite"] != SUITE)
    sections += [_other_table([run for run in runs if run.summary["suite"] == suite], suite) for suite in others]
    template = Template(resources.files("cft_jax.evaluate").joinpath("templates/report.html").read_text("utf-8"))
    names = ", ".join(f"<b>{html.escape(run.name)}</b>" for run in runs)
    differs = f", differences to {html.escape(runs[0].name)}" if len(runs) > 1 else ""
    return template.substitute(
        title="Calibration: evaluations side by side" if len(runs) > 1 else html.escape(f"{runs[0].name}: calibration"),
        heading="How closely do answers follow the distribution?",
        lede=f"{names}{differs}.",
        body="\n".join(section for section in sections if section),
        footer=" · ".join(html.escape(f"{run.name}: {run.summary.get('checkpoint', '')}") for run in runs),
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
    return [_read(name, path / suite) for suite in SUITES if (path / suite / SUMMARY).exists()]


def _read(name: str, path: Path) -> Run:
    summary = read_summary(path)
    if summary is None:
        raise UserError(f"{path} holds no finished evaluation (no summary.json); run cft_jax.evaluate first")
    return Run(name, summary, read_records(path / STORE) if summary["suite"] == SUITE else [])


def _styles(runs: Sequence[Run]) -> dict[str, int]:
    """Number of every run's style; a run alone has the style of a model after training."""
    return {run.name: index if len(runs) > 1 else 1 for index, run in enumerate(runs)}


def _heads(runs: Sequence[Run], first: str) -> str:
    cells = "".join(
        f'<th style="color:var(--{plots.colour_variable(style)})">{html.escape(name)}</th>'
        for name, style in _styles(runs).items()
    )
    return f"<tr><th>{first}</th>{cells}</tr>"


def _split_table(runs: Sequence[Run], split: str) -> str:
    rows = ""
    for section, name, heading, is_share, better in _FIGURES:
        values = [_of(run, split).get(section, {}).get(name) for run in runs]
        if any(value is not None for value in values):
            intervals = [
                _of(run, split).get("intervals", {}).get(name) if section == "sampled" else None for run in runs
            ]
            rows += f"<tr><td>{heading}</td>{_cells(values, intervals, is_share, better)}</tr>"
    if not rows:
        return ""
    # Averages over other prompts are other figures, so the numbers of prompts stand first.
    prompts = "".join(f"<td>{_of(run, split).get('num_prompts', 0):,}</td>" for run in runs)
    table = _table(_heads(runs, ""), f"<tr><td>prompts</td>{prompts}</tr>{rows}")
    return f"<h2>{html.escape(split_title(split))}</h2>{table}"


def _cells(
    values: Sequence[float | None], intervals: Sequence[Sequence[float] | None], is_share: bool, better: int
) -> str:
    """The values of a row, the best in bold, each but the first with its difference to the first."""
    show = percent if is_share else number
    known = [value for value in values if value is not None]
    best = (max(known) if better > 0 else min(known)) if len(known) > 1 else None
    cells = ""
    for index, (value, interval) in enumerate(zip(values, intervals, strict=True)):
        text = show(value)
        if value is not None and value == best:
            text = f"<b>{text}</b>"
        if interval is not None:
            text += f" <small>[{show(interval[0])}, {show(interval[1])}]</small>"
        base = values[0]
        if index and value is not None and base is not None:
            text += f"<br><small>{_difference(value - base, is_share)}</small>"
        cells += f"<td>{text}</td>"
    return cells


def _difference(value: float, is_share: bool) -> str:
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return f"{sign}{100 * abs(value):.1f} points" if is_share else f"{sign}{number(abs(value))}"


def _family_table(runs: Sequence[Run], split: str) -> str:
    families = list(dict.fromkeys(family for run in runs for family in _of(run, split).get("families", {})))
    rows = ""
    for family in families:
        figures = [_of(run, split).get("families", {}).get(family, {}) for run in runs]
        values = [f.get("exact", {}).get("total_variation", _cell_variation(f)) for f in figures]
        if any(value is not None for value in values):
            cells = _cells(values, [None] * len(values), False, -1)
            rows += f"<tr><td>{html.escape(family.replace('_', ' '))}</td>{cells}</tr>"
    if not rows:
        return ""
    title = f"Total variation by family, {split_title(split).lower()}"
    return f"<h2>{html.escape(title)}</h2>" + _table(_heads(runs, "family"), rows)


def _cell_variation(figures: Mapping[str, Any]) -> float | None:
    return figures.get("exact_cells", {}).get("total_variation")


def _gallery(runs: Sequence[Run], splits: Sequence[str]) -> str:
    panels = choose_panels({run.name: run.records for run in runs}, _styles(runs), splits, _MAX_PANELS)
    figures = ""
    for index, (_, panel) in enumerate(panels):
        description = f"{panel.title} {panel.subtitle}: target and {', '.join(panel.models)}"
        caption = f"<span><b>{html.escape(panel.title)}</b>{html.escape(panel.subtitle)}</span>"
        image = plots.svg(plots.panel_figure(panel), f"panel{index}", description)
        figures += f"<figure><figcaption>{caption}</figcaption>{image}</figure>"
    if not figures:
        return ""
    return f'<h2>What the models would answer</h2>{_legend(runs)}<div class="gallery">{figures}</div>'


def _legend(runs: Sequence[Run]) -> str:
    entries = '<span class="t">target</span>'
    for name, style in _styles(runs).items():
        colour = plots.colour_variable(style)
        entries += f'<span><i style="border-color:var(--{colour})"></i>{html.escape(name)}</span>'
    return f'<div class="legend runs">{entries}</div>'


def _calibration(runs: Sequence[Run], splits: Sequence[str]) -> str:
    figures = ""
    for split in splits:
        curves = {run.name: _of(run, split)["calibration"] for run in runs if "calibration" in _of(run, split)}
        if curves:
            identity = "calibration-" + re.sub(r"\W", "-", split)
            image = plots.svg(
                plots.calibration_figure(curves, _styles(runs)), identity, f"calibration, {split_title(split)}"
            )
            caption = f"<span><b>{html.escape(split_title(split))}</b></span>"
            figures += f"<figure><figcaption>{caption}</figcaption>{image}</figure>"
    return f'<h2>Calibration</h2>{_legend(runs)}<div class="gallery">{figures}</div>' if figures else ""


def _other_table(runs: Sequence[Run], suite: str) -> str:
    """Every number of the summaries of another suite."""
    flat = [_numbers(run.summary, "") for run in runs]
    rows = ""
    for name in dict.fromkeys(name for values in flat for name in values):
        cells = "".join(f"<td>{number(values.get(name))}</td>" for values in flat)
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<h2>{html.escape(suite.replace('_', ' '))}</h2>" + _table(_heads(runs, "figure"), rows) if rows else ""


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            if name != "settings":
                found |= _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


def _of(run: Run, split: str) -> Mapping[str, Any]:
    return run.summary["splits"].get(split, {})


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
