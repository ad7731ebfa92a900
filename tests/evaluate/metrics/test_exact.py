"""Exact figures, against arithmetic by hand and against their defining sums."""

import math

import numpy as np
import pytest
from scipy import stats

from cft_jax.evaluate import metrics

VALUES = ("0.5", "-1.0", "2.0")
P = np.array([0.5, 0.25, 0.25])


def log(*q):
    with np.errstate(divide="ignore"):
        return np.log(np.array(q))


def test_exact_figures_by_hand():
    got = metrics.exact_figures(P, log(0.25, 0.25, 0.25), VALUES)
    assert got["kl"] == pytest.approx(0.5 * math.log(2), rel=1e-12)
    # Half of |1/2 - 1/4| plus the quarter that lies elsewhere.
    assert got["total_variation"] == pytest.approx(0.25, rel=1e-12)
    assert got["support_mass"] == pytest.approx(0.75, rel=1e-12)
    # CDFs on -1 < 0.5 < 2: p has 1/4, 3/4; q/Σq has 1/3, 2/3; both gaps are 1.5 long.
    assert got["wasserstein_1"] == pytest.approx(1.5 / 12 + 1.5 / 12, rel=1e-12)


def test_exact_figures_of_the_target_itself():
    got = metrics.exact_figures(P, np.log(P), VALUES)
    assert got["kl"] == got["total_variation"] == got["wasserstein_1"] == 0
    assert got["support_mass"] == 1


def test_exact_figures_where_one_side_has_no_mass():
    got = metrics.exact_figures(np.array([0.0, 1.0, 0.0]), log(0.5, 0.5, 0.0), VALUES)
    assert got["kl"] == pytest.approx(math.log(2))
    assert got["total_variation"] == pytest.approx(0.5)
    assert metrics.exact_figures(P, log(0.0, 0.5, 0.5), VALUES)["kl"] == math.inf


@pytest.mark.parametrize("values", [("a", "b", "c"), ("1", "2", "1e999")])
def test_no_wasserstein_without_numbers(values):
    assert "wasserstein_1" not in metrics.exact_figures(P, np.log(P), values)


def test_wasserstein_agrees_with_scipy():
    rng = np.random.default_rng(3)
    numbers, p, q = rng.normal(size=40), rng.dirichlet(np.ones(40)), rng.dirichlet(np.ones(40))
    expected = stats.wasserstein_distance(numbers, numbers, p, q)
    assert metrics.wasserstein_on_line(numbers, p, q) == pytest.approx(expected, rel=1e-10)


def test_calibration_of_a_perfect_model_is_flat():
    rng = np.random.default_rng(4)
    for p in (rng.dirichlet(np.full(300, 0.3)), np.array([0.9, 0.1]), np.array([0.0, 0.7, 0.0, 0.3, 0.0])):
        target, model = metrics.calibration_bins(p, log(*p), rng.permutation(p.size).astype(np.float64))
        assert target == pytest.approx(np.full(20, 0.05))
        assert model == pytest.approx(np.full(20, 0.05), rel=1e-9)


def test_calibration_shows_where_the_mass_is():
    # Four equal values in descending order of number: the model puts 0.6 on the smallest, 0.2 on the largest.
    numbers = np.array([4.0, 3.0, 2.0, 1.0])
    _, model = metrics.calibration_bins(np.full(4, 0.25), log(0.2, 0.0, 0.0, 0.6), numbers)
    assert model == pytest.approx([0.12] * 5 + [0.0] * 10 + [0.04] * 5)


def test_calibration_counts_mass_on_values_the_target_never_takes():
    p = np.array([0.0, 0.5, 0.5, 0.0])
    _, model = metrics.calibration_bins(p, log(0.1, 0.2, 0.3, 0.4), np.arange(4.0))
    assert model.sum() == pytest.approx(1.0)
    assert model[:10].sum() == pytest.approx(0.3)
