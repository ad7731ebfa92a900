"""What the numbers of an evaluation depend on beside the model, so that a page calls none the best of unlike ones."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cft_jax.evaluate.report.runs import Run, flat, value_at

_SHOWN_CHARACTERS = 40
# Where suites say of how many prompts or documents their metrics are.
_COUNTS = (("num_prompts",), ("overall", "num_prompts"), ("total", "num_documents"))


def measured_alike(runs: Sequence[Run], split: str = "") -> tuple[list[int], str]:
    """Tells runs of one suite apart by how they were measured, of a split's prompts or, if it is empty, of all.

    Returns:
      A number for every run, equal for those measured alike, and a sentence on what the others differ in; it is empty
      if nothing. Runs that measured nothing do not count.
    """
    measured = [run for run in runs if "suite" in run.summary and "missing" not in run.summary]
    if split:
        measured = [run for run in measured if split in run.summary["splits"]]
    by_record = all(run.records for run in measured)
    conditions = {run.name: _conditions(run, split, by_record=by_record) for run in measured}
    names = dict.fromkeys(name for found in conditions.values() for name in found)
    values = {name: {run: found.get(name, "not recorded") for run, found in conditions.items()} for name in names}
    differing = {name: of_runs for name, of_runs in values.items() if len(set(of_runs.values())) > 1}
    keys = [tuple(of_runs.get(run.name) for of_runs in differing.values()) for run in runs]
    told = "; ".join(f"{name} is {_by_value(of_runs)}" for name, of_runs in differing.items())
    note = f"Not all were measured alike: {told}. The best is bold only among those that were." if told else ""
    return [keys.index(key) for key in keys], note


def _conditions(run: Run, split: str, *, by_record: bool) -> dict[str, str]:
    found: dict[str, Any] = {".".join(path): value for path, value in flat(run.summary.get("settings", {})).items()}
    if "protocol" in run.summary:
        found["protocol"] = run.summary["protocol"]
    prompts = sorted((r["split"], r["task_id"]) for r in run.records if split in ("", r["split"]))
    if by_record:
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        found["list of prompts"] = f"{digest[:6]} with {len(prompts)}"
    else:
        paths = [("splits", split, "num_prompts")] if split else _COUNTS
        counts = [value_at(run.summary, path) for path in paths]
        found["number of prompts"] = next((count for count in counts if count is not None), "not recorded")
    return {name: json.dumps(value).strip('"') for name, value in found.items()}


def _by_value(values: dict[str, str]) -> str:
    runs: dict[str, list[str]] = {}
    for run, value in values.items():
        runs.setdefault(value, []).append(run)
    short = {v: v if len(v) <= _SHOWN_CHARACTERS else f"{v[: _SHOWN_CHARACTERS - 1]}…" for v in runs}
    return ", ".join(f"{short[value]} ({', '.join(names)})" for value, names in runs.items())
