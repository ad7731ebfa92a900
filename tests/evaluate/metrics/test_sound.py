"""The sound tests keep their level on draws from the target, written as models write them, and see wrong ones."""

import math

import numpy as np
import pytest
from scipy import stats

from cft_jax.evaluate.metrics import sound
from cft_jax.evaluate.metrics.target import FamilyTarget, ListedTarget

TARGETS = {
    "gaussian": FamilyTarget("gaussian", {"mu": 1.0, "sigma": 2.0}, 1),
    "cauchy": FamilyTarget("cauchy", {"x0": 0.0, "gamma": 0.75}, 5),
    "exponential": FamilyTarget("exponential", {"lambda": 0.5}, 2),
    "poisson": FamilyTarget("poisson", {"lambda": 3.5}, 5),
    "skellam": FamilyTarget("skellam", {"mu1": 2.0, "mu2": 1.0}, 5),
    "beta_binomial": FamilyTarget("beta_binomial", {"n": 10.0, "alpha": 2.0, "beta": 3.0}, 5),
    "listed": ListedTarget.of([3.0, 1.0, 2.0, 8.0], np.array([0.1, 0.2, 0.3, 0.4])),
}


def written(target, rng, count):
    """Draws as a model writes them."""
    values = target.draw(rng, (count,))
    return np.round(values, target.num_decimals) if isinstance(target, FamilyTarget) else values


@pytest.mark.parametrize("name", TARGETS)
def test_level_of_the_tests(name):
    target = TARGETS[name]
    rng = np.random.default_rng(5)
    pvalues = {}
    for _ in range(300):
        figures = sound.tests_of_target(written(target, rng, 100), target, rng)
        for key, value in figures.items():
            if key.endswith("pvalue"):
                pvalues.setdefault(key, []).append(value)
    assert len(pvalues) == (3 if name in ("poisson", "skellam", "beta_binomial") else 2)
    for key, values in pvalues.items():
        # 300 p-values: a binomial share at 10 % has a standard deviation of 0.017.
        assert np.mean(np.array(values) < 0.1) == pytest.approx(0.1, abs=0.07), key


@pytest.mark.parametrize("name", TARGETS)
def test_power_against_a_shift(name):
    target = TARGETS[name]
    rng = np.random.default_rng(6)
    values = written(target, rng, 1000) + (1.0 if name != "exponential" else 0.5)
    figures = sound.tests_of_target(values, target, rng)
    assert all(value < 1e-3 for key, value in figures.items() if key.endswith("pvalue"))


def test_anderson_darling_quantiles():
    # Quantiles of the limiting distribution: 2.492 at 95 % and 3.857 at 99 % (Stephens 1974, table 1A, case 0).
    for statistic, pvalue in ((2.492, 0.05), (3.857, 0.01), (1.933, 0.10)):
        assert 1 - sound._anderson_darling_limit(statistic) == pytest.approx(pvalue, abs=3e-4)


@pytest.mark.parametrize("count", [3, 8, 50])
def test_anderson_darling_at_finite_counts(count):
    """Against 100,000 simulated samples of uniform numbers."""
    u = np.sort(np.random.default_rng(7).random((100_000, count)), axis=1)
    weights = (2 * np.arange(1, count + 1) - 1) / count
    simulated = -count - (weights * (np.log(u) + np.log1p(-u[:, ::-1]))).sum(axis=1)
    for row in range(0, 40):
        statistic, pvalue = sound.anderson_darling(u[row])
        assert statistic == pytest.approx(simulated[row])
        assert pvalue == pytest.approx(np.mean(simulated >= statistic), abs=0.006)


def test_impossible_values_reject_for_certain():
    rng = np.random.default_rng(8)
    bernoulli = FamilyTarget("bernoulli", {"p": 0.5}, 5)
    values = np.array([0.0, 1.0] * 50)
    assert sound.tests_of_target(values, bernoulli, rng)["chi_square_pooled_pvalue"] > 0.5
    for impossible in (2.0, -1.0, 0.5):
        figures = sound.tests_of_target(np.append(values, impossible), bernoulli, rng)
        assert figures["chi_square_pooled_pvalue"] == 0
        assert figures["chi_square_pooled_statistic"] == math.inf
    exponential = FamilyTarget("exponential", {"lambda": 1.0}, 2)
    assert sound.tests_of_target(np.array([0.3, -5.0]), exponential, rng)["anderson_darling_pvalue"] == 0


def test_pooling_keeps_every_expectation_at_five():
    # By hand, 20 observations: expectations 2, 4 | 6 | 6, 2 are pooled to 6, 6, 8.
    probabilities = np.array([0.1, 0.2, 0.3, 0.3, 0.1])
    observed = np.array([1.0, 4.0, 8.0, 6.0, 1.0])
    statistic, pvalue, cells = sound.pooled_chi_square(observed, probabilities)
    assert cells == 3
    assert statistic == pytest.approx(1 / 6 + 4 / 6 + 1 / 8)
    assert pvalue == pytest.approx(stats.chi2.sf(statistic, 2))
    assert sound.pooled_chi_square(np.array([3.0, 4.0]), np.array([0.5, 0.5])) is None


def test_one_outlier_does_not_own_the_pooled_statistic():
    # The paper's statistic is 1e12 here (tests/golden/metrics.jsonl.gz, integer_outlier); the pool's is ordinary.
    target = FamilyTarget("poisson", {"lambda": 5.519974947207012}, 5)
    values = np.append(target.draw(np.random.default_rng(9), (300,)), 60.0)
    observed, probabilities = sound.integer_cells(values, target)
    result = sound.pooled_chi_square(observed, probabilities)
    assert result is not None
    assert result[0] < 100


def test_ideal_sampler_has_the_known_noise():
    """W1 of 1,000 true draws; medians of 5,000 simulated samples are 1.83 for the Cauchy, 14.7 for the lognormal."""
    rng = np.random.default_rng(10)
    gaussian = sound.ideal_metrics(FamilyTarget("gaussian", {"mu": 0.0, "sigma": 1.0}, 5), 1000, rng)
    # The mean of |N(0, 1/n)| is sqrt(2 / (pi n)).
    assert gaussian["mean_error"] == pytest.approx(math.sqrt(2 / (math.pi * 1000)), rel=0.15)
    assert gaussian["wasserstein_1_median"] < gaussian["wasserstein_1_p95"]
    cauchy = sound.ideal_metrics(FamilyTarget("cauchy", {"x0": 0.0, "gamma": 1.0}, 5), 1000, rng)
    assert set(cauchy) == {"wasserstein_1", "wasserstein_1_median", "wasserstein_1_p95"}
    assert cauchy["wasserstein_1_median"] == pytest.approx(1.83, rel=0.15)
    lognormal = sound.ideal_metrics(FamilyTarget("lognormal", {"mu": 2.5, "sigma": 2.0}, 5), 1000, rng)
    assert lognormal["wasserstein_1_median"] == pytest.approx(14.7, rel=0.15)


def test_bootstrap_intervals_cover():
    """The mean's error at 3 true standard errors from the target: the interval holds it in about 95 % of samples."""
    target = FamilyTarget("gaussian", {"mu": 0.0, "sigma": 1.0}, 5)
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(200):
        interval = sound.bootstrap_intervals(rng.normal(0.5, 1.0, 100), target, rng)["mean_error"]
        hits += interval.low <= 0.5 <= interval.high
    assert hits / 200 == pytest.approx(0.95, abs=0.06)


def test_bootstrap_is_silent_where_the_target_has_no_moment():
    target = FamilyTarget("cauchy", {"x0": 0.0, "gamma": 1.0}, 5)
    intervals = sound.bootstrap_intervals(np.arange(10.0), target, np.random.default_rng(0))
    assert set(intervals) == {"wasserstein_1"}
    assert sound.bootstrap_intervals(np.array([1.0]), target, np.random.default_rng(0)) == {}


def test_rate_interval():
    # Wilson's interval of 8 in 10 is [0.4902, 0.9433] (Brown, Cai and DasGupta 2001, formula 4).
    interval = sound.rate_interval(8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert sound.rate_interval(10, 10).low < 1 == sound.rate_interval(10, 10).high


def test_distance_in_interquartile_ranges():
    target = FamilyTarget("uniform", {"a": 0.0, "b": 8.0}, 5)
    assert sound.in_interquartile_ranges(1.0, target) == pytest.approx(0.25)
    assert sound.in_interquartile_ranges(1.0, FamilyTarget("bernoulli", {"p": 0.01}, 5)) is None


def test_quantiles_of_integers_where_scipys_never_end():
    target = FamilyTarget("skellam", {"mu1": 2.63, "mu2": 7.43}, 1)  # scipy 1.17: "updating stopped, endless loop"
    levels, quantiles = (np.arange(100) + 0.5) / 100, target.quantiles(100)
    assert (target.frozen.cdf(quantiles) >= levels).all() and (target.frozen.cdf(quantiles - 1) < levels).all()
    poisson = TARGETS["poisson"]
    assert (poisson.quantiles(50) == poisson.frozen.ppf((np.arange(50) + 0.5) / 50)).all()
    assert poisson.interquartile_range == np.ptp(poisson.frozen.ppf([0.25, 0.75]))
