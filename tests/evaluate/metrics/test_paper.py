"""The paper's figures equal those of its reference implementation (tests/golden/metrics.jsonl.gz)."""

import math

import numpy as np
import pytest

from cft_jax.distributions.splits import PromptSpec
from cft_jax.evaluate import metrics


def spec_of(row):
    # Only the family and the parameters may matter, so everything else is nonsense.
    return PromptSpec("no split", row["family_id"], "no id", row["parameters"], "no prompt")


def assert_golden(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        if isinstance(value, str):
            assert got[name] == value
        else:
            assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


def test_every_golden_row(golden_rows):
    rows = golden_rows("metrics")
    assert len(rows) == 51
    for row in rows:
        samples, spec = row["samples"], spec_of(row)
        assert_golden(metrics.moment_errors(samples, spec), row["moment_errors"])
        assert_golden(metrics.goodness_of_fit(samples, spec), row["gof"])
        assert metrics.wasserstein_1(samples, spec) == pytest.approx(row["wasserstein_1"], rel=1e-9, abs=1e-12)


def test_arrays_and_order_make_no_difference():
    spec = PromptSpec("", "gamma", "", {"alpha": 2.0, "beta": 1.5}, "")
    values = np.random.default_rng(0).gamma(2.0, 1.5, 50)
    shuffled = list(np.random.default_rng(1).permutation(values))
    for figure in (metrics.moment_errors, metrics.goodness_of_fit):
        assert_golden(figure(shuffled, spec), figure(values, spec))


def test_non_finite_values_are_left_out_of_wasserstein():
    # The pair of the infinite value is dropped: by hand |-1 - q(1/6)| and |0 - q(1/2)| remain, q the normal quantile.
    spec = PromptSpec("", "gaussian", "", {"mu": 0.0, "sigma": 1.0}, "")
    got = metrics.wasserstein_1([math.inf, 0.0, -1.0], spec)
    assert got == pytest.approx(abs(-1 - -0.967421566101701) / 2, rel=1e-12)
