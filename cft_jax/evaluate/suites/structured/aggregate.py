"""From the metrics of every prompt to those of a split: averages in which every family counts alike. Pure."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cft_jax.evaluate.metrics.exact import CALIBRATION_BINS

Record = Mapping[str, Any]
# Weight and value of the prompts of one family that have a metric.
_Column = Sequence[tuple[float, Any]]

AGGREGATION = "equal_family_weight"
SIGNIFICANCE = 0.05
# Sections of a prompt's record whose metrics are averaged, and the names they have in a summary. Of the first, which
# compare the model with the target, there are medians and averages of each family too.
_COMPARISONS = ("path", "exact", "exact_cells", "sampled")
SECTIONS = (*_COMPARISONS, "exact_scaled", "exact_cells_scaled", "sampled_scaled", "ideal", "other_stops")
_TESTS = ("ks_randomised", "anderson_darling", "chi_square_pooled")
_PAPER_TESTS = ("paper_ks", "paper_chi_square", "paper_anderson")
_Z95 = 1.959963984540054


def summarise_split(records: Sequence[Record], num_samples: int) -> dict[str, Any]:
    """The metrics of one split.

    Every average weighs prompts by their weight within a family and families equally. A prompt without a metric is
    left out of its average, and `left_out` counts such prompts.

    Args:
      records: of all prompts of the split; at least one.
      num_samples: answers asked for per prompt and seed; 0 when nothing was sampled.

    Returns:
      `num_prompts`, `num_families`, `aggregation`; by section the averages (`path`, `exact`, `sampled`, ...);
      `medians`, where each family weighs alike; `intervals`, 95 % intervals of the sampled averages; `tests`, how often
      each test rejects at 5 %; `left_out`, by section and metric; `calibration`; `lenient_parses`; and `families`, the
      averages of each. Sections without any metric are absent.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    lenient_parses: Counter[str] = Counter()
    for record in records:
        groups[record["group"]].append(record)
        lenient_parses.update(record.get("lenient_parses", {}))
    summary: dict[str, Any] = {"num_prompts": len(records), "num_families": len(groups), "aggregation": AGGREGATION}
    medians, left_out = {}, {}
    for section in SECTIONS:
        metrics = _columns(groups.values(), section)
        if not metrics:
            continue
        summary[section] = {name: math.fsum(map(_mean, columns)) / len(columns) for name, columns in metrics.items()}
        if section in _COMPARISONS:
            medians[section] = {name: _median(columns) for name, columns in metrics.items()}
        missing = {name: len(records) - sum(map(len, columns)) for name, columns in metrics.items()}
        left_out[section] = {name: count for name, count in missing.items() if count and section != "ideal"}
    if "sampled" in summary:
        summary["sampled"]["num_samples"] = num_samples
        errors = _columns(groups.values(), "intervals")
        summary["intervals"] = {
            name: _interval(name, average, errors[name])
            for name, average in summary["sampled"].items()
            if name in errors
        }
    return summary | {
        "medians": medians,
        "tests": _rejections(records),
        "left_out": {section: counts for section, counts in left_out.items() if counts},
        **_calibration(groups),
        "lenient_parses": dict(lenient_parses),
        "families": {group: _family(members) for group, members in groups.items()},
    }


def _columns(families: Iterable[Sequence[Record]], section: str) -> dict[str, list[_Column]]:
    """The metrics of a section in order of first appearance, each with a column for every family that has it."""
    metrics: dict[str, list[_Column]] = defaultdict(list)
    for members in families:
        own: dict[str, list[tuple[float, Any]]] = defaultdict(list)
        for record in members:
            for name, value in record.get(section, {}).items():
                own[name].append((record["weight"], value))
        for name, column in own.items():
            metrics[name].append(column)
    return metrics


def _mean(column: _Column) -> float:
    return math.fsum(weight * value for weight, value in column) / math.fsum(weight for weight, _ in column)


def _median(columns: Sequence[_Column]) -> float:
    """Weighted median over prompts in which the families that have the metric weigh alike."""
    values, weights = [], []
    for column in columns:
        total = math.fsum(weight for weight, _ in column)
        values += [value for _, value in column]
        weights += [weight / total for weight, _ in column]
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(np.asarray(weights)[order])
    return float(np.asarray(values)[order][np.searchsorted(cumulative, 0.5 * cumulative[-1] * (1 - 1e-12))])


def _interval(name: str, average: float, columns: Sequence[_Column]) -> list[float]:
    """95 % interval of an average, from the prompts' standard errors; the prompts themselves are taken as given."""
    variances = [
        math.fsum((weight * interval[2]) ** 2 for weight, interval in column)
        / math.fsum(weight for weight, _ in column) ** 2
        for column in columns
    ]
    half = _Z95 * math.sqrt(math.fsum(variances)) / len(variances)
    high = average + half
    return [max(average - half, 0.0), min(high, 1.0) if name.endswith("_rate") else high]


def _rejections(records: Sequence[Record]) -> dict[str, Any]:
    """Share of prompts that each test rejects at 5 %; a perfect sampler is rejected in 5 % of them."""
    outcomes: dict[str, list[bool]] = {name: [] for name in (*_TESTS, *_PAPER_TESTS)}
    for record in records:
        tests, paper = record.get("tests", {}), record.get("paper_gof", {})
        for name in _TESTS:
            if f"{name}_pvalue" in tests:
                outcomes[name].append(tests[f"{name}_pvalue"] < SIGNIFICANCE)
        # The paper's tests under the paper's names: which one it is depends on the family.
        if "gof_pvalue" in paper:
            outcomes[f"paper_{paper['gof_test']}"].append(paper["gof_pvalue"] < SIGNIFICANCE)
        if {"anderson_statistic", "anderson_critical_5pct"} <= {*paper}:
            outcomes["paper_anderson"].append(paper["anderson_statistic"] > paper["anderson_critical_5pct"])
    return {
        name: {"num_prompts": len(rejected), "rejected_at_5pct": sum(rejected) / len(rejected)}
        for name, rejected in outcomes.items()
        if rejected
    }


def _calibration(groups: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """The model's mass in bins of equal target mass: average over families, and its spread over prompts."""
    families = [[record for record in members if "calibration" in record] for members in groups.values()]
    rows = [record["calibration"] for members in families for record in members]
    if not rows:
        return {}
    means = [
        np.average([r["calibration"] for r in members], axis=0, weights=[r["weight"] for r in members])
        for members in families
        if members
    ]
    # The curve: the model's share below the target's quantiles, for every prompt.
    low, high = np.percentile(np.cumsum(rows, axis=1), [10, 90], axis=0)
    return {
        "calibration": {
            "target": [1.0 / CALIBRATION_BINS] * CALIBRATION_BINS,
            "model": np.mean(means, axis=0).tolist(),
            "cumulative_p10": low.tolist(),
            "cumulative_p90": high.tolist(),
        }
    }


def _family(members: Sequence[Record]) -> dict[str, Any]:
    sections = {section: _columns([members], section) for section in _COMPARISONS}
    means = {name: {key: _mean(column) for key, (column,) in metrics.items()} for name, metrics in sections.items()}
    return {"num_prompts": len(members)} | {name: metrics for name, metrics in means.items() if metrics}
