"""What a page shows: evaluations of one or several models, and the training between two of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.common.writer import read_metrics
from cft_jax.evaluate.results import ALL, STORE, SUMMARY, read_summary
from cft_jax.evaluate.store import Record, read_records

STAGES = ("before", "after")


@dataclass(frozen=True)
class Run:
    """One suite's evaluation of one model.

    `summary` is `summary.json`, or `suite` and the reason, `missing`, of a suite that could not run; `style` the number
    of the model's colour and line, the same everywhere on the page.
    """

    name: str
    summary: Mapping[str, Any]
    records: Sequence[Record] = ()
    style: int = 0


@dataclass(frozen=True)
class Training:
    """A run of the main job: the rows of `metrics.jsonl`; of `config.json` configuration, revision and devices."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]


def flat(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of a record and of the records inside it, by their paths."""
    leaves: dict[tuple[str, ...], Any] = {}
    for name, value in values.items():
        leaves |= flat(value, (*path, name)) if isinstance(value, Mapping) else {(*path, name): value}
    return leaves


def section_at(summary: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The section at a path of a summary; an empty one where there is none."""
    for name in path:
        inner = summary.get(name)
        summary = inner if isinstance(inner, Mapping) else {}
    return summary


def value_at(summary: Mapping[str, Any], path: Sequence[str]) -> float | int | None:
    """The number at a path of a summary; None where there is none."""
    value = section_at(summary, path[:-1]).get(path[-1])
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_training(workdir: Path) -> tuple[list[Run], Training]:
    """The evaluations of a run of the main job, named by their stages, and its training; what is missing is left out.

    Raises:
      UserError: a file is damaged.
    """
    runs = [_read(stage, path, style=STAGES.index(stage)) for stage, path in _stages(workdir)]
    config = workdir / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return runs, Training(workdir.resolve().name, read_metrics(workdir / "metrics.jsonl"), content)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The evaluations in these directories, in order; one of a run of the main job holds those of both stages.

    Raises:
      UserError: a directory holds no evaluation, or a damaged one.
    """
    by_path = [_runs_of(path) for path in paths]
    names = [(run.name, run.summary["suite"]) for runs in by_path for run in runs]
    repeated = {name for name, suite in names if names.count((name, suite)) > 1}
    # Directories of the same name and suite are told apart by their number in the list.
    runs = [
        replace(run, name=f"{run.name} ({index})") if run.name in repeated else run
        for index, runs in enumerate(by_path, 1)
        for run in runs
    ]
    models = list(dict.fromkeys(run.name for run in runs))
    return [replace(run, style=models.index(run.name) if len(models) > 1 else 1) for run in runs]


def _runs_of(path: Path) -> list[Run]:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the --workdir of an evaluation or of a run")
    whole = path.resolve()
    name = whole.name
    if name in STAGES and whole.parent.parent.name == "eval":
        name = f"{whole.parents[2].name} {name}"
    if stages := [_read(f"{name} {stage}", directory) for stage, directory in _stages(path)]:
        return stages
    run = _read(name, path)
    if run.summary["suite"] != ALL:
        return [run]
    return [
        Run(name, {"suite": suite, **part}) if "missing" in part else _read(name, path / suite)
        for suite, part in run.summary["suites"].items()
    ]


def _stages(workdir: Path) -> Iterator[tuple[str, Path]]:
    """The finished evaluations of a run of the main job: stage and directory."""
    for stage in STAGES:
        for summary in sorted(workdir.glob(f"eval/*/{stage}/{SUMMARY}")):
            yield stage, summary.parent


def _read(name: str, path: Path, style: int = 0) -> Run:
    summary = read_summary(path)
    if summary is None:
        raise UserError(f"{path} holds no finished evaluation (no {SUMMARY}); run cft_jax.evaluate first")
    return Run(name, summary, read_records(path / STORE, summary.get("fingerprint", "")), style)
