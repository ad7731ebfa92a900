"""From the metrics of every prompt to those of a split: averages in which every family counts alike. Pure."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cft_jax.evaluate.metrics.exact import CALIBRATION_BINS

Record = Mapping[str, Any]

AGGREGATION = "equal_family_weight"
SIGNIFICANCE = 0.05
# Sections of a prompt's record whose metrics are averaged, and the names they have in a summary.
SECTIONS = (
    "path",
    "exact",
    "exact_cells",
    "sampled",
    "exact_scaled",
    "exact_cells_scaled",
    "sampled_scaled",
    "ideal",
    "other_stops",
)
_FAMILY_SECTIONS = _MEDIAN_SECTIONS = ("path", "exact", "exact_cells", "sampled")
_TESTS = ("ks_randomised", "anderson_darling", "chi_square_pooled")
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
    groups = _by_group(records)
    summary: dict[str, Any] = {"num_prompts": len(records), "num_families": len(groups), "aggregation": AGGREGATION}
    left_out: dict[str, dict[str, int]] = {}
    for section in SECTIONS:
        metrics = {name: _average(groups, section, name) for name in _names(records, section)}
        if metrics:
            summary[section] = {name: value for name, (value, _) in metrics.items()}
            if section != "ideal":
                left_out[section] = {name: count for name, (_, count) in metrics.items() if count}
    if "sampled" in summary:
        summary["sampled"]["num_samples"] = num_samples
        summary["intervals"] = _intervals(groups, summary["sampled"])
    summary["medians"] = {
        section: {name: _median(groups, section, name) for name in _names(records, section)}
        for section in _MEDIAN_SECTIONS
        if section in summary
    }
    summary["tests"] = _rejections(groups)
    summary["left_out"] = {section: counts for section, counts in left_out.items() if counts}
    summary |= _calibration(groups)
    summary["lenient_parses"] = _lenient_parses(records)
    summary["families"] = {group: _family(members) for group, members in groups.items()}
    return summary


def _by_group(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    return dict(groups)


def _names(records: Sequence[Record], section: str) -> list[str]:
    """Names of the numeric metrics of a section, in order of first appearance."""
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(name for name, value in record.get(section, {}).items() if _is_number(value)))
    return list(found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weighted_mean(members: Sequence[Record], section: str, name: str) -> tuple[float | None, int]:
    """Mean over one family's prompts, and the number of prompts without the metric."""
    having = [record for record in members if name in record.get(section, {})]
    left_out = len(members) - len(having)
    if not having:
        return None, left_out
    total = math.fsum(record["weight"] for record in having)
    return math.fsum(record["weight"] * record[section][name] for record in having) / total, left_out


def _average(groups: Mapping[str, Sequence[Record]], section: str, name: str) -> tuple[float, int]:
    means, left_out = zip(*(_weighted_mean(members, section, name) for members in groups.values()), strict=True)
    values = [mean for mean in means if mean is not None]
    return math.fsum(values) / len(values), sum(left_out)


def _median(groups: Mapping[str, Sequence[Record]], section: str, name: str) -> float:
    """Weighted median over prompts in which the families that have the metric weigh alike."""
    values, weights = [], []
    for members in groups.values():
        having = [record for record in members if name in record.get(section, {})]
        total = math.fsum(record["weight"] for record in having)
        values += [record[section][name] for record in having]
        weights += [record["weight"] / total for record in having]
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(np.asarray(weights)[order])
    return float(np.asarray(values)[order][np.searchsorted(cumulative, 0.5 * cumulative[-1] * (1 - 1e-12))])


def _intervals(groups: Mapping[str, Sequence[Record]], averages: Mapping[str, float]) -> dict[str, list[float]]:
    """95 % intervals of the averages, from the prompts' standard errors; the prompts themselves are taken as given."""
    found = {}
    for name, average in averages.items():
        variances = [_mean_variance(members, name) for members in groups.values()]
        known = [variance for variance in variances if variance is not None]
        if known:
            half = _Z95 * math.sqrt(math.fsum(known)) / len(known)
            low, high = max(average - half, 0.0), average + half
            found[name] = [low, min(high, 1.0) if name.endswith("_rate") else high]
    return found


def _mean_variance(members: Sequence[Record], name: str) -> float | None:
    errors = [(r["weight"], r["intervals"][name][2]) for r in members if name in r.get("intervals", {})]
    if not errors:
        return None
    total = math.fsum(weight for weight, _ in errors)
    return math.fsum((weight * error) ** 2 for weight, error in errors) / total**2


def _rejections(groups: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Share of prompts that each test rejects at 5 %; a perfect sampler is rejected in 5 % of them."""
    found = {}
    records = [record for members in groups.values() for record in members]
    columns = {name: ("tests", f"{name}_pvalue", None) for name in _TESTS}
    # The paper's tests under the paper's names: which one it is depends on the family.
    columns |= {f"paper_{test}": ("paper_gof", "gof_pvalue", test) for test in ("ks", "chi_square")}
    for name, (section, key, test) in columns.items():
        pvalues = [
            record[section][key]
            for record in records
            if key in record.get(section, {}) and test in (None, record[section].get("gof_test"))
        ]
        if pvalues:
            rejected = sum(pvalue < SIGNIFICANCE for pvalue in pvalues)
            found[name] = {"num_prompts": len(pvalues), "rejected_at_5pct": rejected / len(pvalues)}
    fits = [
        r["paper_gof"] for r in records if {"anderson_statistic", "anderson_critical_5pct"} <= {*r.get("paper_gof", ())}
    ]
    if fits:
        rejected = sum(fit["anderson_statistic"] > fit["anderson_critical_5pct"] for fit in fits)
        found["paper_anderson"] = {"num_prompts": len(fits), "rejected_at_5pct": rejected / len(fits)}
    return found


def _calibration(groups: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """The model's mass in bins of equal target mass: average over families, and its spread over prompts."""
    rows = [record["calibration"] for members in groups.values() for record in members if "calibration" in record]
    if not rows:
        return {}
    family_means = [
        np.average([r["calibration"] for r in having], axis=0, weights=[r["weight"] for r in having])
        for members in groups.values()
        if (having := [r for r in members if "calibration" in r])
    ]
    # The curve: the model's share below the target's quantiles, for every prompt.
    low, high = np.percentile(np.cumsum(rows, axis=1), [10, 90], axis=0)
    return {
        "calibration": {
            "target": [1.0 / CALIBRATION_BINS] * CALIBRATION_BINS,
            "model": [float(mass) for mass in np.mean(family_means, axis=0)],
            "cumulative_p10": [float(value) for value in low],
            "cumulative_p90": [float(value) for value in high],
        }
    }


def _lenient_parses(records: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        for kind, count in record.get("lenient_parses", {}).items():
            counts[kind] = counts.get(kind, 0) + count
    return counts


def _family(members: Sequence[Record]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"num_prompts": len(members)}
    for section in _FAMILY_SECTIONS:
        means = {name: _weighted_mean(members, section, name)[0] for name in _names(members, section)}
        if means:
            metrics[section] = means
    return metrics
