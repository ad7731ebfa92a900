"""Spaces at full resolution against their definition, written out string by string."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.distributions import FAMILIES, PromptSpec, build_splits
from cft_jax.distributions.analytic_space import analytic_space

QUANTILE = 1e-6


def spec_of(family_id, **parameters):
    return PromptSpec("train", family_id, "x", parameters, "")


def one_spec_per_family():
    found = {}
    for specs in build_splits().values():
        for spec in specs:
            found.setdefault(spec.family_id, []).append(spec)
    return {family_id: specs[len(specs) // 3] for family_id, specs in found.items()}


SPECS = one_spec_per_family()
CONTINUOUS = [f for f in SPECS if not FAMILIES[f].integer_only]
INTEGER = [f for f in SPECS if FAMILIES[f].integer_only]


def test_all_families_are_covered():
    assert set(SPECS) == set(FAMILIES) and len(SPECS) == 30


@pytest.mark.parametrize("family_id", CONTINUOUS)
def test_continuous_masses_are_those_of_the_definition(family_id):
    spec = SPECS[family_id]
    distribution = FAMILIES[family_id].frozen(spec.parameters)
    space = analytic_space(spec, num_decimals=1, quantile=1e-4)
    integers = np.arange(space.first, space.last + 1)
    low, high = (integers - 0.5) / 10, (integers + 0.5) / 10
    lower_half = high <= distribution.median()
    expected = np.where(
        lower_half,
        distribution.cdf(high) - distribution.cdf(low),
        distribution.sf(low) - distribution.sf(high),
    )
    expected[0] = distribution.cdf(high[0]) if integers.size > 1 else 1
    if integers.size > 1:
        expected[-1] = distribution.sf(low[-1])
    masses = space.interval_masses(integers, integers + 1)
    np.testing.assert_allclose(masses, expected, rtol=0, atol=1e-14)
    assert masses.sum() == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("family_id", INTEGER)
def test_integer_masses_are_the_pmf_and_the_tails(family_id):
    spec = SPECS[family_id]
    distribution = FAMILIES[family_id].frozen(spec.parameters)
    space = analytic_space(spec, num_decimals=5, quantile=QUANTILE)
    assert space.num_decimals == 0
    integers = np.arange(space.first, space.last + 1)
    expected = distribution.pmf(integers)
    # Both tails far beyond the bounds, summed one by one.
    expected[0] += distribution.pmf(np.arange(space.first - 500, space.first)).sum()
    expected[-1] += distribution.pmf(np.arange(space.last + 1, space.last + 2000)).sum()
    np.testing.assert_allclose(space.interval_masses(integers, integers + 1), expected, rtol=1e-10, atol=1e-15)


def test_skellam_is_the_difference_of_two_poisson_numbers():
    space = analytic_space(spec_of("skellam", mu1=6.0, mu2=2.5), num_decimals=5, quantile=QUANTILE)
    counts = np.arange(200)
    integers = np.arange(space.first + 1, space.last)
    expected = [(stats.poisson(6.0).pmf(counts + k) * stats.poisson(2.5).pmf(counts)).sum() for k in integers]
    np.testing.assert_allclose(space.interval_masses(integers, integers + 1), expected, rtol=0, atol=1e-14)


def test_integers_too_many_for_a_table_keep_their_masses():
    # 2e6 + 1 values, so the cdf; the binomial pmf itself is the reference.
    space = analytic_space(spec_of("binomial", n=2_000_000, p=0.3), num_decimals=5, quantile=QUANTILE)
    integers = np.arange(597_000, 603_001)
    expected = stats.binom(2_000_000, 0.3).pmf(integers)
    np.testing.assert_allclose(space.interval_masses(integers, integers + 1), expected, rtol=0, atol=1e-12)


def test_bounds_are_the_supports_where_finite_and_quantiles_elsewhere():
    space = analytic_space(spec_of("uniform", a=-2.9000000000000004, b=0.29), num_decimals=2, quantile=QUANTILE)
    # 0.29 * 100 is 28.999999999999996 in doubles.
    assert (space.first, space.last) == (-290, 29)
    space = analytic_space(spec_of("exponential", **{"lambda": 2.0}), num_decimals=3, quantile=QUANTILE)
    # By hand: -ln(1e-6) / 2 = 6.90775...
    assert (space.first, space.last) == (0, 6907)
    space = analytic_space(spec_of("gaussian", mu=1.0, sigma=2.0), num_decimals=5, quantile=QUANTILE)
    # The 1e-6 quantile of the standard normal is -4.753424...
    assert (space.first, space.last) == (-850684, 1050684)
    space = analytic_space(spec_of("poisson", **{"lambda": 3.0}), num_decimals=5, quantile=QUANTILE)
    assert space.first == 0 and stats.poisson(3.0).sf(space.last) <= 1e-6 < stats.poisson(3.0).sf(space.last - 1)


def test_bounds_with_no_number_between_them_leave_one_string():
    space = analytic_space(spec_of("uniform", a=0.113, b=0.117), num_decimals=1, quantile=QUANTILE)
    assert space.strings(np.array([space.first])) == ["0.1"] and space.num_values == 1
    assert space.interval_masses(np.array([1]), np.array([2])) == 1.0
    assert space.draw(np.array([0.0, 0.7])).tolist() == [1, 1]
    assert space.entropy == 0


@pytest.mark.parametrize(
    ("spec", "only"),
    [
        (spec_of("geometric", p=1.0), 1),
        (spec_of("binomial", n=5, p=1.0), 5),
        (spec_of("negative_binomial", r=3, p=1.0), 0),
        (spec_of("hypergeometric", M=10, K=0, N=3), 0),
        (spec_of("poisson", **{"lambda": 1e-9}), 0),
    ],
)
def test_certain_outcomes(spec, only):
    space = analytic_space(spec, num_decimals=5, quantile=QUANTILE)
    assert space.interval_masses(np.array([only]), np.array([only + 1])) == pytest.approx(1, abs=1e-8)
    assert set(space.draw(np.random.default_rng(0).random(100)).tolist()) == {only}
    assert space.entropy == pytest.approx(0, abs=1e-6)


def test_end_strings_take_what_lies_beyond():
    space = analytic_space(spec_of("cauchy", x0=0.0, gamma=1.0), num_decimals=2, quantile=0.01)
    ends = np.array([space.first, space.last])
    # The 1 % quantile, -31.8205..., lies 0.05 steps beyond the end string -31.82, whose mass reaches half a step in.
    expected = stats.cauchy.sf(space.last / 100 - 0.005)
    np.testing.assert_allclose(space.interval_masses(ends, ends + 1), [expected, expected], rtol=1e-12)


def test_both_tails_keep_their_digits():
    space = analytic_space(spec_of("gaussian", mu=0.0, sigma=1.0), num_decimals=5, quantile=1e-12)
    integers = np.arange(space.last - 2000, space.last)
    upper = space.interval_masses(integers, integers + 1)
    lower = space.interval_masses(-integers, -integers + 1)
    np.testing.assert_allclose(upper, lower, rtol=1e-12)
    np.testing.assert_allclose(upper, stats.norm.pdf(integers / 1e5) * 1e-5, rtol=1e-8)


@pytest.mark.parametrize("num_decimals", [9, 13, 17])
def test_masses_stay_precise_where_the_cdf_cancels(num_decimals):
    # At 17 decimals most k are beyond 2**53 and neighbours have equal cdf values.
    space = analytic_space(spec_of("triangular", a=0.0, c=2.0, b=8.0), num_decimals=num_decimals, quantile=QUANTILE)
    scale = 10**num_decimals
    integers = np.array([scale // 2, scale, 3 * scale + 7, 7 * scale + 12345], dtype=np.int64)
    for width in (1, 10, 1000):
        expected = stats.triang(0.25, 0, 8).pdf((integers + (width - 1) / 2) / scale) * width / scale
        np.testing.assert_allclose(space.interval_masses(integers, integers + width), expected, rtol=2e-9)


@settings(max_examples=100, deadline=None)
@given(family_id=st.sampled_from(sorted(SPECS)), cuts=st.lists(st.floats(0, 1), min_size=0, max_size=20))
def test_intervals_add_up(family_id, cuts):
    space = analytic_space(SPECS[family_id], num_decimals=5, quantile=QUANTILE)
    inner = [space.first + int(cut * (space.num_values - 1)) for cut in cuts]
    edges = np.unique(np.array([space.first, space.last + 1, *inner], dtype=np.int64))
    masses = space.interval_masses(edges[:-1], edges[1:])
    assert (masses >= 0).all()
    assert masses.sum() == pytest.approx(1, abs=1e-12)


def test_edges_outside_the_space_hold_nothing():
    space = analytic_space(spec_of("beta", alpha=2.0, beta=3.0), num_decimals=5, quantile=QUANTILE)
    start = np.array([-50, 100_001, 0, -7])
    stop = np.array([0, 200_000, 100_001, 300_000])
    assert space.interval_masses(start, stop).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("family_id", CONTINUOUS)
def test_draws_follow_the_family(family_id):
    spec = SPECS[family_id]
    space = analytic_space(spec, num_decimals=5, quantile=QUANTILE)
    draws = space.draw(np.random.default_rng(7).random(20_000))
    assert draws.dtype == np.int64
    assert draws.min() >= space.first and draws.max() <= space.last
    result = stats.kstest(space.numbers(draws), FAMILIES[family_id].frozen(spec.parameters).cdf)
    assert result.pvalue > 1e-4


@pytest.mark.parametrize("family_id", INTEGER)
def test_integer_draws_follow_the_family(family_id):
    spec = SPECS[family_id]
    space = analytic_space(spec, num_decimals=5, quantile=QUANTILE)
    draws = space.draw(np.random.default_rng(7).random(20_000))
    integers = np.arange(space.first, space.last + 1)
    expected = 20_000 * FAMILIES[family_id].frozen(spec.parameters).pmf(integers)
    counts = np.bincount(draws - space.first, minlength=integers.size)
    # Cells expecting less than 10 are merged into one, the tails beyond the bounds among them.
    large = expected >= 10
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], 20_000 - expected[large].sum())
    kept = expected > 0
    assert observed[~kept].sum() == 0
    assert stats.chisquare(observed[kept], expected[kept] * 20_000 / expected[kept].sum()).pvalue > 1e-4


def test_a_draw_is_the_string_at_its_quantile():
    for family_id in ("gaussian", "poisson", "lognormal"):
        space = analytic_space(SPECS[family_id], num_decimals=2, quantile=1e-4)
        integers = np.arange(space.first, space.last + 1)
        masses = space.interval_masses(integers, integers + 1)
        middle = masses.cumsum() - masses / 2
        wide = masses > 1e-6
        np.testing.assert_array_equal(space.draw(middle[wide]), integers[wide])
    assert space.draw(np.array([0.0, 1 - 2.0**-53])).tolist() == [space.first, space.last]


def test_numbers_are_what_the_strings_read_as():
    space = analytic_space(SPECS["cauchy"], num_decimals=5, quantile=QUANTILE)
    draws = space.draw(np.random.default_rng(3).random(2000))
    assert [float(text) for text in space.strings(draws)] == space.numbers(draws).tolist()


def test_entropy():
    # ln(sigma * sqrt(2 pi e)) nats of the density plus ln(1e5) of the steps; the cut at 1e-6 takes some 1e-5.
    space = analytic_space(spec_of("gaussian", mu=0.3, sigma=2.0), num_decimals=5, quantile=QUANTILE)
    assert space.entropy == pytest.approx(np.log(2 * np.sqrt(2 * np.pi * np.e)) + 5 * np.log(10), abs=3e-5)
    # 101 strings, the two at the ends half as probable: by hand 2 (1/200) ln 200 + 99 (1/100) ln 100.
    space = analytic_space(spec_of("uniform", a=0.0, b=1.0), num_decimals=2, quantile=QUANTILE)
    assert space.entropy == pytest.approx(0.01 * np.log(200) + 0.99 * np.log(100), rel=1e-12)


@pytest.mark.parametrize("family_id", ["cauchy", "gamma", "gumbel", "lognormal", "lomax"])
def test_entropy_of_many_strings_equals_their_sum(family_id):
    space = analytic_space(SPECS[family_id], num_decimals=4, quantile=0.01)
    edges = np.arange(space.first, space.last + 2)
    assert edges.size > 2**16
    masses = space.interval_masses(edges[:-1], edges[1:])
    masses = masses[masses > 0]
    assert space.entropy == pytest.approx(-(masses * np.log(masses)).sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "num_decimals", "quantile", "message"),
    [
        (SPECS["gaussian"], 18, 1e-6, "num_decimals=18"),
        (SPECS["gaussian"], -1, 1e-6, "num_decimals=-1"),
        (SPECS["gaussian"], 5, 0.5, "full_quantile=0.5"),
        (spec_of("pareto", alpha=0.1, xm=1.0), 5, 1e-6, "fewer decimals or a larger config.data.full_quantile"),
        (spec_of("gaussian", mu=20.0, sigma=1.0), 17, 1e-6, "too far"),
        (spec_of("geometric", p=1e-16), 5, 1e-6, "too far"),
    ],
)
def test_impossible_spaces_are_refused(spec, num_decimals, quantile, message):
    with pytest.raises(UserError, match=message):
        analytic_space(spec, num_decimals=num_decimals, quantile=quantile)
