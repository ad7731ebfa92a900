"""Metrics of sampled numbers that hold as statistics: tests with the stated level, intervals, and an ideal sampler.

Models write rounded numbers, so values are tied. The tests use the randomised probability integral transform: a value
x becomes P(X < x) + U P(X = x) with U uniform, which is exactly uniform on (0, 1) for draws from the target, discrete
or rounded alike. A value the target cannot give makes the Anderson-Darling and chi-square statistics infinite.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from cft_jax.evaluate.metrics.paper import error_metrics
from cft_jax.evaluate.metrics.target import FamilyTarget, Target

MIN_EXPECTED_PER_CELL = 5.0
REPLICATES = 200
ERROR_METRICS = ("mean_error", "variance_error", "wasserstein_1")


def anderson_darling(pit: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Anderson-Darling statistic of uniformity of at least two values in [0, 1] and its p-value, nothing fitted.

    The p-value is that of Marsaglia and Marsaglia, Evaluating the Anderson-Darling distribution, Journal of
    Statistical Software 9(2), 2004; against simulation it is off by at most 0.002 for 8 values, 0.01 for 2.
    (infinity, 0) when a value is 0 or 1.
    """
    count = pit.size
    ordered = np.sort(pit)
    if ordered[0] <= 0 or ordered[-1] >= 1:
        return math.inf, 0.0
    weights = (2 * np.arange(1, count + 1) - 1) / count
    statistic = -count - float(np.sum(weights * (np.log(ordered) + np.log1p(-ordered[::-1]))))
    limit = _anderson_darling_limit(statistic)
    return statistic, min(max(1 - limit - _anderson_darling_correction(count, limit), 0.0), 1.0)


def pooled_chi_square(
    observed: Float[np.ndarray, "C"], probabilities: Float[np.ndarray, "C"]
) -> tuple[float, float, int] | None:
    """Chi-square test of counts over cells pooled from neighbours until each expects at least 5.

    Returns:
      Statistic, p-value and number of cells; infinity and 0 when a cell without probability was hit; None when fewer
      than two cells remain.
    """
    if observed[probabilities <= 0].any():
        return math.inf, 0.0, int(probabilities.size)
    expected = probabilities * observed.sum()
    starts = _pool_starts(expected)
    if len(starts) < 2:
        return None
    expected, observed = np.add.reduceat(expected, starts), np.add.reduceat(observed, starts)
    statistic = float(np.sum((observed - expected) ** 2 / expected))
    return statistic, float(stats.chi2.sf(statistic, len(starts) - 1)), len(starts)


def integer_cells(
    values: Float[np.ndarray, "N"], target: FamilyTarget
) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Counts and probabilities of cells of an integer target, between its quantiles, for `pooled_chi_square`.

    What is no integer of the support falls into a last cell of probability 0.
    """
    lower, upper = target.family.support(target.parameters)
    possible = (values >= lower) & (values <= upper) & (values == np.round(values))
    num_cells = max(2, int(values.size / MIN_EXPECTED_PER_CELL))
    edges = np.unique(target.frozen.ppf(np.arange(1, num_cells) / num_cells))
    probabilities = np.diff(np.concatenate([[0.0], target.frozen.cdf(edges), [1.0]]))
    observed = np.bincount(np.searchsorted(edges, values[possible], side="left"), minlength=probabilities.size)
    impossible = values.size - int(possible.sum())
    return np.append(observed, impossible).astype(np.float64), np.append(probabilities, 0.0)


def tests_of_target(values: Float[np.ndarray, "N"], target: Target, rng: np.random.Generator) -> dict[str, float]:
    """The tests of a sample of finite numbers against what the prompt asked for; `rng` spreads the ties.

    Returns:
      `ks_randomised_*` and `anderson_darling_*` with `statistic` and `pvalue`; for integer families also
      `chi_square_pooled_*` with `cells`. Empty for fewer than two values; what cannot be tested is absent.
    """
    if values.size < 2:
        return {}
    below, at = target.cdf_around(values)
    pit = below + rng.random(values.size) * (at - below)
    ks: Any = stats.ks_1samp(pit, stats.uniform.cdf, method="exact")
    metrics = {"ks_randomised_statistic": float(ks.statistic), "ks_randomised_pvalue": float(ks.pvalue)}
    metrics["anderson_darling_statistic"], metrics["anderson_darling_pvalue"] = anderson_darling(pit)
    if isinstance(target, FamilyTarget) and target.family.integer_only:
        metrics.update(chi_square_metrics(*integer_cells(values, target)))
    return metrics


def chi_square_metrics(observed: Float[np.ndarray, "C"], probabilities: Float[np.ndarray, "C"]) -> dict[str, float]:
    """`chi_square_pooled_statistic`, `_pvalue` and `_cells` of `pooled_chi_square`; empty where it has no result."""
    result = pooled_chi_square(observed, probabilities)
    if result is None:
        return {}
    return dict(zip([f"chi_square_pooled_{part}" for part in ("statistic", "pvalue", "cells")], result, strict=True))


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and the standard error it goes with."""

    low: float
    high: float
    standard_error: float


def bootstrap_intervals(
    values: Float[np.ndarray, "N"], target: Target, rng: np.random.Generator
) -> dict[str, Interval]:
    """95 % bootstrap intervals of the error metrics of a sample.

    Errors are absolute values, so resampling inflates them: the percentiles are shifted by the mean excess of the
    resampled metrics over the sample's own, and cut at 0. Metrics that do not exist have none, nor have single values.
    """
    if values.size < 2:
        return {}
    metrics = {name: float(row[0]) for name, row in error_metrics(values[None, :], target).items()}
    resampled = error_metrics(values[rng.integers(0, values.size, (REPLICATES, values.size))], target)
    intervals = {}
    for name, metric in metrics.items():
        replicates = resampled[name]
        if math.isfinite(metric) and np.isfinite(replicates).all():
            low, high = np.percentile(replicates, [2.5, 97.5]) - float(replicates.mean()) + metric
            intervals[name] = Interval(max(float(low), 0.0), float(high), float(replicates.std(ddof=1)))
    return intervals


def rate_interval(hits: int, count: int) -> Interval:
    """Wilson's 95 % interval of a rate, which unlike a bootstrap has a width at 0 and at 1; `count` is at least 1."""
    rate, z = hits / count, 1.959963984540054
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == count else centre + half
    return Interval(low, high, (high - low) / (2 * z))


def ideal_metrics(target: Target, count: int, rng: np.random.Generator) -> dict[str, float]:
    """The error metrics a sampler of exactly the target gets with `count` draws, from 200 such samples.

    For every one that exists `<name>`, the mean, `<name>_median`, since heavy tails make the mean noisy and much larger
    than what is typical (Cauchy: its mean does not exist), and `<name>_p95`, which 5 % exceed.
    """
    if count < 1:
        return {}
    metrics = {}
    for name, replicates in error_metrics(target.draw(rng, (REPLICATES, count)), target).items():
        if np.isfinite(replicates).all():
            median, high = np.percentile(replicates, [50, 95])
            metrics |= {name: float(replicates.mean()), f"{name}_median": float(median), f"{name}_p95": float(high)}
    return metrics


def in_interquartile_ranges(distance: float, target: Target) -> float | None:
    """A distance in units of the target's interquartile range; None where that is zero."""
    spread = target.interquartile_range
    return distance / spread if spread > 0 else None


def _pool_starts(expected: Float[np.ndarray, "C"]) -> Sequence[int]:
    """First cells of the pools: from left to right each as small as can be, the rest joins the last."""
    starts, mass = [0], 0.0
    for cell, value in enumerate(expected[:-1]):
        mass += value
        if mass >= MIN_EXPECTED_PER_CELL:
            starts.append(cell + 1)
            mass = 0.0
    if mass + expected[-1] < MIN_EXPECTED_PER_CELL and len(starts) > 1:
        starts.pop()
    return starts


def _anderson_darling_limit(z: float) -> float:
    """Distribution function of the statistic for infinitely many observations (`adinf` of the paper)."""
    if z <= 0:
        return 0.0
    if z < 2:
        polynomial = 2.00012 + (0.247105 - (0.0649821 - (0.0347962 - (0.0116720 - 0.00168691 * z) * z) * z) * z) * z
        return math.exp(-1.2337141 / z) / math.sqrt(z) * polynomial
    polynomial = 1.0776 - (2.30695 - (0.43424 - (0.082433 - (0.008056 - 0.0003146 * z) * z) * z) * z) * z
    return math.exp(-math.exp(polynomial))


def _anderson_darling_correction(count: int, x: float) -> float:
    """What the distribution function at finite `count` adds to its limit x (`errfix` of the paper)."""
    n = float(count)
    if x > 0.8:
        return (-130.2137 + (745.2337 - (1705.091 - (1950.646 - (1116.360 - 255.7844 * x) * x) * x) * x) * x) / n
    cut = 0.01265 + 0.1757 / n
    if x < cut:
        t = x / cut
        return math.sqrt(t) * (1 - t) * (49 * t - 102) * (0.0037 / n**2 + 0.00078 / n + 0.00006) / n
    t = (x - cut) / (0.8 - cut)
    t = -0.00022633 + (6.54034 - (14.6538 - (14.458 - (8.259 - 1.91864 * t) * t) * t) * t) * t
    return t * (0.04213 + 0.01365 / n) / n
