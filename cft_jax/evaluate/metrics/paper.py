"""The paper's metrics of sampled numbers: moments, Wasserstein-1 and goodness of fit, under the paper's names.

Several are unsound as statistics: the chi-square test pools no cells, the Anderson-Darling test fits the parameters
to the sample, Kolmogorov-Smirnov ignores that values are rounded. Sound ones stand beside them in `sound.py`.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real
from scipy import stats

from cft_jax.distributions.splits import PromptSpec
from cft_jax.evaluate.metrics.target import FamilyTarget, Target

MAX_CHI_SQUARE_CELLS = 10**7
_MIN_EXPECTED = 1e-12

# By family scipy's name, the value at 5 % of Stephens (1974, 1979) and its corrections for n observations, by 1/n and
# 1/n^2, as in scipy.stats.anderson, which knows none at 5 % for the Weibull distribution.
_ANDERSON = {
    "gaussian": ("norm", 0.752, 0.75, 2.25),
    "exponential": ("expon", 1.321, 0.6, 0.0),
    "logistic": ("logistic", 0.660, 0.25, 0.0),
    "weibull": ("weibull_min", math.nan, 0.0, 0.0),
}
_MIN_ANDERSON_OBSERVATIONS = 5


def moment_errors(values: Sequence[float | int] | Real[np.ndarray, "N"], spec: PromptSpec) -> dict[str, float]:
    """Mean and variance of a sample in any order, their errors, and Wasserstein-1.

    Of the target's `spec` only `family_id` and `parameters` matter.

    Returns:
      `sample_mean`; `sample_variance` (divisor n); `mean_error` and `variance_error`, absolute differences from the
      target's, NaN where that one is not finite; `wasserstein_1`. Without values NaN, and infinity for Wasserstein-1.
    """
    return moment_metrics(np.asarray(values, np.float64), _target(spec))


def wasserstein_1(values: Sequence[float | int] | Real[np.ndarray, "N"], spec: PromptSpec) -> float:
    """Mean distance between the sorted sample and the target's quantiles at (i - 0.5)/n, in the units of the values.

    Pairs that are not finite are left out; infinity without any.
    """
    return moment_errors(values, spec)["wasserstein_1"]


def moment_metrics(sample: Float[np.ndarray, "N"], target: Target) -> dict[str, float]:
    """`moment_errors` against any target."""
    if not sample.size:
        undefined = ("sample_mean", "sample_variance", "mean_error", "variance_error")
        return {**dict.fromkeys(undefined, math.nan), "wasserstein_1": math.inf}
    with np.errstate(all="ignore"):
        moments = {"sample_mean": float(np.mean(sample)), "sample_variance": float(np.var(sample))}
    return moments | {name: float(row[0]) for name, row in error_metrics(sample[None, :], target).items()}


def error_metrics(samples: Float[np.ndarray, "R N"], target: Target) -> dict[str, Float[np.ndarray, "R"]]:
    """`mean_error`, `variance_error` and `wasserstein_1` of every row.

    Errors are NaN where the target has no such moment; Wasserstein-1 is the mean |x_(i) - quantile_i| of finite pairs,
    infinity where there is none.
    """
    with np.errstate(all="ignore"):
        mean, variance = samples.mean(axis=1), samples.var(axis=1)
        nowhere = np.full(len(samples), math.nan)
        distance = np.abs(np.sort(samples, axis=1) - target.quantiles(samples.shape[1]))
        finite = np.isfinite(distance)
        count, total = finite.sum(axis=1), np.where(finite, distance, 0.0).sum(axis=1)
        return {
            "mean_error": np.abs(mean - target.mean) if math.isfinite(target.mean) else nowhere,
            "variance_error": np.abs(variance - target.variance) if math.isfinite(target.variance) else nowhere,
            "wasserstein_1": np.where(count > 0, total / np.maximum(count, 1), math.inf),
        }


def goodness_of_fit(values: Sequence[float | int] | Real[np.ndarray, "N"], spec: PromptSpec) -> dict[str, float | str]:
    """The paper's test of a sample against its target.

    Continuous families: the two-sided Kolmogorov-Smirnov test with exact p-value, and for Gaussian, exponential,
    logistic and Weibull with at least 5 values `anderson_statistic` and `anderson_critical_5pct` of the test that fits
    the parameters to the sample. Integer families: chi-square over single integers without pooling. Of the target's
    `spec` only `family_id` and `parameters` matter.

    Returns:
      `gof_test` (`ks` or `chi_square`), `gof_statistic`, `gof_pvalue`; NaN where there are too few values or more than
      10 million cells.
    """
    sample, target = np.asarray(values, np.float64), _target(spec)
    if target.family.integer_only:
        statistic, pvalue = _chi_square(sample, target)
        return {"gof_test": "chi_square", "gof_statistic": statistic, "gof_pvalue": pvalue}
    statistic, pvalue = math.nan, math.nan
    if sample.size >= 2:
        result: Any = stats.ks_1samp(sample, target.frozen.cdf, method="exact")
        statistic, pvalue = float(result.statistic), float(result.pvalue)
    anderson = _composite_anderson(sample, target)
    return {"gof_test": "ks", "gof_statistic": statistic, "gof_pvalue": pvalue, **anderson}


def _target(spec: PromptSpec) -> FamilyTarget:
    return FamilyTarget(spec.family_id, spec.parameters, num_decimals=5)


def _composite_anderson(sample: Float[np.ndarray, "N"], target: FamilyTarget) -> dict[str, float]:
    count = sample.size
    if target.family_id not in _ANDERSON or count < _MIN_ANDERSON_OBSERVATIONS:
        return {}
    name, value, first, second = _ANDERSON[target.family_id]
    try:
        # Warnings: of the fit, of constant samples (NaN, as in the paper) and of scipy's own changes of interface.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            result: Any = stats.anderson(sample, name)
    except (ValueError, stats.FitError):
        return {}
    critical = round(value / (1.0 + first / count + second / count**2), 3)
    return {"anderson_statistic": float(result.statistic), "anderson_critical_5pct": critical}


def _chi_square(sample: Float[np.ndarray, "N"], target: FamilyTarget) -> tuple[float, float]:
    if not sample.size:
        return math.nan, math.nan
    frozen = target.frozen
    lower, upper = target.family.support(target.parameters)
    integers = np.round(sample)
    lo = lower if math.isfinite(lower) else min(float(integers.min()), math.floor(frozen.ppf(0.001)))
    hi = upper if math.isfinite(upper) else max(float(integers.max()), math.ceil(frozen.ppf(0.999)))
    if not hi - lo + 1 <= MAX_CHI_SQUARE_CELLS:
        return math.nan, math.nan
    inside = integers[(integers >= lo) & (integers <= hi)]
    cells = np.arange(lo, hi + 1)
    observed = np.bincount((inside - lo).astype(np.int64), minlength=cells.size).astype(np.float64)
    probabilities = np.asarray(frozen.pmf(cells), np.float64)
    # What lies beyond an unbounded side is a cell of its own; by construction nothing was observed there.
    if not math.isfinite(lower):
        observed, probabilities = np.append(observed, 0.0), np.append(probabilities, frozen.cdf(lo - 1))
    if not math.isfinite(upper):
        observed, probabilities = np.append(observed, 0.0), np.append(probabilities, frozen.sf(hi))
    expected = np.maximum(probabilities * inside.size, _MIN_EXPECTED)
    with np.errstate(all="ignore"):
        expected *= observed.sum() / expected.sum()
        statistic = float(np.sum((observed - expected) ** 2 / expected))
    return statistic, float(stats.chi2.sf(statistic, len(observed) - 1))
