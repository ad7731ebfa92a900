"""Output spaces against the paper's (tests/golden/output_space.jsonl.gz), and their properties for any parameters."""

import gzip
import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import FAMILIES
from cft_jax.distributions.output_space import OutputSpace, decimal_strings, number_space, output_space
from cft_jax.distributions.splits import PromptSpec, build_splits

SETTINGS = ("num_decimals", "max_bins", "quantile_low", "quantile_high", "tail_policy")


def make_spec(family_id, parameters):
    return PromptSpec(split="test", family_id=family_id, distribution_id="any", parameters=parameters, prompt="")


def close(got, want):
    # tests/golden/README.md: 1e-12 relative plus 1e-15 absolute.
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_equals_the_paper(golden):
    with gzip.open(golden / "output_space.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert {row["origin"] for row in rows} == {"grid", "edge"}
    for row in rows:
        space = output_space(make_spec(row["family_id"], row["parameters"]), **{name: row[name] for name in SETTINGS})
        p = space.probabilities
        where = row["distribution_id"]
        assert len(space.values) == len(p) == row["count"], where
        assert list(space.values[:5]) == row["first5"] and list(space.values[-5:]) == row["last5"], where
        assert hashlib.sha256("\n".join(space.values).encode()).hexdigest() == row["sha256"], where
        close(p[:5], row["prob_first5"])
        close(p[-5:], row["prob_last5"])
        close(p.sum(), row["prob_sum"])
        close(p @ np.arange(p.size), row["mean_index"])
        close(-np.sum(p[p > 0] * np.log(p[p > 0])), row["entropy_nats"])
        close(p.max(), row["max_prob"])
        assert int(p.argmax()) == row["argmax"], where
        assert int((p == 0).sum()) == row["num_zero_probs"], where
        close([space.lower_bound, space.upper_bound], [row["lower_bound"], row["upper_bound"]])
        if row["is_full"]:
            assert list(space.values) == row["values"]
            close(p, row["probabilities"])


# Any family, then any of its prompts.
PROMPTS = {
    family_id: [spec for split in build_splits().values() for spec in split if spec.family_id == family_id]
    for family_id in FAMILIES
}
specs = st.sampled_from(list(FAMILIES)).flatmap(lambda family_id: st.sampled_from(PROMPTS[family_id]))


@settings(max_examples=150, deadline=None)
@given(spec=specs, num_decimals=st.integers(0, 6), max_bins=st.integers(2, 300))
def test_properties(spec, num_decimals, max_bins):
    lower, upper = FAMILIES[spec.family_id].support(spec.parameters)
    space = output_space(spec, num_decimals=num_decimals, max_bins=max_bins)
    numbers = np.array([float(value) for value in space.values])
    assert 1 <= len(numbers) <= max_bins
    assert np.all(np.diff(numbers) > 0)
    assert np.all(space.probabilities >= 0)
    assert space.probabilities.sum() == pytest.approx(1, abs=1e-14)
    if len(numbers) > 1:
        half = 0.5 * 10.0**-num_decimals * 1e-6  # bounds are doubles, numbers multiples of 10**-num_decimals
        assert numbers[0] >= max(space.lower_bound, lower) - half
        assert numbers[-1] <= min(space.upper_bound, upper) + half
    decimals = 0 if FAMILIES[spec.family_id].integer_only else num_decimals
    assert {len(value.partition(".")[2]) for value in space.values} == {decimals}
    assert not any(value.startswith("-0") and float(value) == 0 for value in space.values if len(numbers) > 1)


@settings(max_examples=60, deadline=None)
@given(spec=specs, max_bins=st.integers(2, 2000), data=st.data())
def test_single_strings_are_those_of_the_list(spec, max_bins, data):
    space = number_space(spec, num_decimals=5, max_bins=max_bins)
    listed = space.listed()
    indices = np.array(data.draw(st.lists(st.integers(0, len(listed.values) - 1), min_size=1, max_size=20)))
    assert space.strings(indices) == [listed.values[index] for index in indices]


@settings(max_examples=200, deadline=None)
@given(
    integers=st.lists(st.integers(-(2**50) + 1, 2**50 - 1), min_size=0, max_size=30), num_decimals=st.integers(0, 12)
)
def test_decimal_strings_are_python_s(integers, num_decimals):
    want = [f"{k * 10.0**-num_decimals:.{num_decimals}f}" for k in integers]
    assert decimal_strings(np.array(integers, dtype=np.float64), num_decimals) == want
    assert decimal_strings(np.array(integers, dtype=np.int64), num_decimals) == want


def test_decimal_strings_keep_every_digit():
    integers = np.array([-(2**62) + 1, -7, 0, 2**53 + 1])
    assert decimal_strings(integers, 3) == ["-4611686018427387.903", "-0.007", "0.000", "9007199254740.993"]
    assert decimal_strings(np.array([-0.0, 0.0]), 2) == ["-0.00", "0.00"]


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1e6, 1e6), size=st.integers(60, 200_000), num_decimals=st.integers(0, 3), max_bins=st.integers(2, 50)
)
def test_kept_points_are_those_of_the_whole_grid(low, size, num_decimals, max_bins):
    spec = make_spec("uniform", {"a": low, "b": low + size * 10.0**-num_decimals})
    space = number_space(spec, num_decimals=num_decimals, max_bins=max_bins)
    # The paper's rule on the materialised grid.
    grid = space.first + np.arange(space.range_size)
    kept = grid[np.linspace(0, grid.size - 1, max_bins).astype(np.int64)]
    np.testing.assert_array_equal(space.integers(), kept)


def test_wide_ranges_are_not_materialised():
    space = output_space(make_spec("lognormal", {"mu": 10.0, "sigma": 3.0}), num_decimals=5, max_bins=1001)
    assert space.upper_bound > 1e8  # 1e13 grid points of 8 bytes would not fit
    assert len(space.values) == 1001
    with pytest.raises(UserError, match="too far for doubles with num_decimals=5; take fewer decimals"):
        output_space(make_spec("lognormal", {"mu": 30.0, "sigma": 3.0}), num_decimals=5, max_bins=1001)
    with pytest.raises(UserError, match="outside the range of doubles"):
        output_space(make_spec("lognormal", {"mu": 699.0, "sigma": 30.0}), num_decimals=0, max_bins=1001)


@pytest.mark.parametrize(
    ("family_id", "parameters", "only"),
    [("geometric", {"p": 1.0}, "1"), ("negative_binomial", {"r": 3.0, "p": 1.0}, "0")],
)
def test_certain_outcomes(family_id, parameters, only):
    space = output_space(make_spec(family_id, parameters), num_decimals=5, max_bins=1001)
    assert space.values == (only,) and space.probabilities.tolist() == [1.0]


def test_integers_without_probability():
    # binomial(5000, 0.9) has its mass around 4500: the first 1001 integers carry less than 1e-308.
    with pytest.raises(UserError, match="the integers 0 to 1000 have no probability; max_bins=1001 must be larger"):
        output_space(make_spec("binomial", {"n": 5000.0, "p": 0.9}), num_decimals=5, max_bins=1001)


@pytest.mark.parametrize(
    ("family_id", "parameters", "tail_policy", "lost"),
    [
        ("gaussian", {"mu": 0.0, "sigma": 1.0}, "clip_to_edge_bin", 0.0),
        ("gaussian", {"mu": 0.0, "sigma": 1.0}, "none", 0.002),  # 0.1 % beyond each cut
        ("binomial", {"n": 2.0, "p": 0.5}, "clip_to_edge_bin", 0.0),
        ("binomial", {"n": 100.0, "p": 0.5}, "clip_to_edge_bin", stats.binom.sf(49, 100, 0.5)),  # only 0..49 are kept
        ("poisson", {"lambda": 20.0}, "clip_to_edge_bin", 0.0),  # its 99.9 % quantile, 35, is kept
        ("poisson", {"lambda": 50.0}, "clip_to_edge_bin", stats.poisson.sf(49, 50)),  # piled onto 49
        ("poisson", {"lambda": 4e4}, "clip_to_edge_bin", 1.0),
        ("skellam", {"mu1": 9.0, "mu2": 9.0}, "clip_to_edge_bin", stats.skellam.cdf(-14, 9, 9)),  # from its 0.1 %: -13
    ],
)
def test_lost_mass(family_id, parameters, tail_policy, lost):
    spec = make_spec(family_id, parameters)
    space = output_space(spec, num_decimals=2, max_bins=50, tail_policy=tail_policy)
    assert space.lost_mass == pytest.approx(lost, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bins": 1}, "max_bins=1 must be at least 2"),
        ({"num_decimals": -1}, "num_decimals=-1 at least 0"),
        ({"tail_policy": "clip"}, "tail_policy='clip' must be one of clip_to_edge_bin, drop, none"),
        ({"quantile_low": 0.999}, "must satisfy 0 < low < high < 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError) as error:
        output_space(make_spec("gaussian", {"mu": 0.0, "sigma": 1.0}), **{"num_decimals": 2, "max_bins": 9, **options})
    assert message in str(error.value)


def test_bad_parameters_name_themselves():
    with pytest.raises(UserError, match=r"gaussian: sigma=-1\.0 must be greater than 0"):
        output_space(make_spec("gaussian", {"mu": 0.0, "sigma": -1.0}), num_decimals=2, max_bins=9)


def test_any_strings():
    space = OutputSpace(("yes", "yes, but\nlater", "é", ""), np.array([0.5, 0.25, 0.25, 0.0]))
    assert space.values == ("yes", "yes, but\nlater", "é", "")
    np.testing.assert_array_equal(space.probabilities, [0.5, 0.25, 0.25, 0.0])
    assert math.isnan(space.lower_bound) and math.isnan(space.upper_bound)
    assert not space.probabilities.flags.writeable


def test_the_callers_array_is_left_alone():
    given_probabilities = np.array([0.5, 0.5 + 5e-7])
    space = OutputSpace(("a", "b"), given_probabilities)
    assert space.probabilities.sum() == pytest.approx(1, abs=1e-15)
    assert given_probabilities.sum() == 1 + 5e-7 and given_probabilities.flags.writeable


@pytest.mark.parametrize(
    ("values", "probabilities", "message"),
    [
        ((), [], "at least one value"),
        (("a", "b"), [1.0], "2 values need as many probabilities"),
        (("a", "b", "a"), [0.5, 0.25, 0.25], "value 'a' occurs more than once"),
        (("a", "b"), [1.5, -0.5], "probability -0.5 of 'b' must be finite and not negative"),
        (("a", "b"), [math.nan, 1.0], "probability nan of 'a' must be finite"),
        (("a", "b"), [0.5, 0.6], "probabilities sum to 1.1; they must sum to 1 within 1e-06"),
        (("a", "b"), [0.0, 0.0], "probabilities sum to 0;"),
    ],
)
def test_bad_listed_spaces(values, probabilities, message):
    with pytest.raises(UserError) as error:
        OutputSpace(values, np.array(probabilities))
    assert message in str(error.value)
