"""The families against the paper's table (tests/golden/families.json) and the rules of their parameters."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import FAMILIES, HELDOUT_FAMILIES, TRAIN_FAMILIES, find_family
from cft_jax.distributions.grids import GRIDS


@pytest.fixture(scope="module")
def table(golden):
    return json.loads((golden / "families.json").read_text())


@pytest.fixture(scope="module")
def rows(table):
    return {row["family_id"]: row for row in table["families"]}


def evaluate(expression, parameters):
    """A cell of the golden tables: a short arithmetic expression over parameters, one of them named `lambda`."""
    text = expression.replace("lambda", "lambda_")
    names = {name.replace("lambda", "lambda_"): value for name, value in parameters.items()}
    functions = {"round": round, "min": min, "max": max, "exp": math.exp}
    return eval(text, {"__builtins__": {}}, {**functions, **names})


def middle_point(family_id):
    return {
        name: axis.values[len(axis.values) // 2]
        for name, axis in zip(FAMILIES[family_id].grid_parameter_names, GRIDS[family_id].main, strict=True)
    }


def test_names_and_order(table, rows):
    assert list(FAMILIES) == list(rows)
    assert list(TRAIN_FAMILIES) == table["settings"]["train_families"]
    assert list(HELDOUT_FAMILIES) == table["settings"]["heldout_families"]
    for family_id, row in rows.items():
        family = FAMILIES[family_id]
        for name in ("family_id", "display_name", "tier", "kind", "integer_only", "role"):
            assert getattr(family, name) == row[name], (family_id, name)
        assert list(family.grid_parameter_names) == row["grid_parameter_names"]
        assert list(family.parameter_names) == row["prompt_parameter_names"]
        assert family.distribution.name == row["scipy_distribution"]


@pytest.mark.parametrize("family_id", FAMILIES)
def test_functions_of_the_parameters(rows, family_id):
    family, row = FAMILIES[family_id], rows[family_id]
    point = middle_point(family_id)
    parameters = family.prompt_parameters(point)
    want = {name: evaluate(text, point) for name, text in row["prompt_parameters_from_grid"].items()}
    assert parameters == want
    assert list(parameters) == list(want)

    lower, upper = (
        evaluate(text, parameters) if text is not None else sign * math.inf
        for text, sign in zip(row["support_from_prompt"], (-1, 1), strict=True)
    )
    assert family.support(parameters) == (lower, upper)

    arguments = {name: evaluate(text, parameters) for name, text in row["scipy_arguments_from_prompt"].items()}
    reference = getattr(stats, row["scipy_distribution"])(**arguments)
    frozen = family.frozen(parameters)
    points = reference.ppf([0.01, 0.3, 0.5, 0.9])
    np.testing.assert_array_equal(frozen.ppf([0.01, 0.3, 0.5, 0.9]), points)
    np.testing.assert_array_equal(frozen.cdf(points), reference.cdf(points))


@pytest.mark.parametrize(
    ("family_id", "parameters", "message"),
    [
        ("gaussian", {"mu": 0.0, "sigma": -1.0}, "gaussian: sigma=-1.0 must be greater than 0"),
        ("gaussian", {"mu": 0.0, "sigma": 0.0}, "gaussian: sigma=0.0 must be greater than 0"),
        ("gaussian", {"mu": math.nan, "sigma": 1.0}, "gaussian: mu=nan must be a finite number"),
        ("gaussian", {"mu": "1", "sigma": 1.0}, "gaussian: mu='1' must be a finite number"),
        ("binomial", {"n": 10**400, "p": 0.5}, "must be a finite number"),
        ("gaussian", {"mu": True, "sigma": 1.0}, "gaussian: mu=True must be a finite number"),
        ("gaussian", {"mu": 0.0}, "gaussian: parameter sigma is missing; it takes mu, sigma"),
        ("gaussian", {"mu": 0.0, "sd": 1.0, "sigma": 1.0}, "gaussian: unknown parameter sd; it takes mu, sigma"),
        ("uniform", {"a": 1.0, "b": 1.0}, "uniform: a=1.0, b=1.0 must satisfy a < b"),
        ("triangular", {"a": 0.0, "c": 2.0, "b": 1.0}, "must satisfy a <= c <= b and a < b"),
        ("binomial", {"n": 2.5, "p": 0.5}, "binomial: n=2.5 must be a whole number of at least 1"),
        ("binomial", {"n": 2.0, "p": 1.5}, "binomial: p=1.5 must be between 0 and 1"),
        ("geometric", {"p": 0.0}, "geometric: p=0.0 must be greater than 0 and at most 1"),
        ("hypergeometric", {"M": 10.0, "K": 20.0, "N": 5.0}, "M=10.0, K=20.0, N=5.0 must satisfy K <= M"),
        ("hypergeometric", {"M": 10.0, "K": 5.0, "N": 11.0}, "must satisfy N <= M"),
        ("truncnorm", {"mu": 0.0, "sigma": 1.0, "lower": 2.0, "upper": 1.0}, "must satisfy lower < upper"),
    ],
)
def test_bad_parameters_name_themselves(family_id, parameters, message):
    for use in (FAMILIES[family_id].validate, FAMILIES[family_id].frozen, FAMILIES[family_id].support):
        with pytest.raises(UserError) as error:
            use(parameters)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_all_problems_at_once():
    with pytest.raises(UserError, match=r"sigma=-1\.0 .*; lower=inf "):
        FAMILIES["truncnorm"].validate({"mu": 0.0, "sigma": -1.0, "lower": math.inf, "upper": 1.0})


def test_integers_are_numbers_too():
    assert FAMILIES["binomial"].frozen({"n": 4, "p": 0.5}).pmf(2) == pytest.approx(6 / 16)  # by hand: C(4,2) / 2^4


@pytest.mark.parametrize("family_id", FAMILIES)
def test_draws_follow_the_family(family_id):
    """scipy refuses counts that are floats; 0.05 is the DKW bound of 2,000 draws at a chance of 1e-4."""
    family = FAMILIES[family_id]
    frozen = family.frozen(family.prompt_parameters(middle_point(family_id)))
    draws, counts = np.unique(frozen.rvs(2000, random_state=np.random.default_rng(0)), return_counts=True)
    assert np.max(np.abs(np.cumsum(counts) / 2000 - frozen.cdf(draws))) < 0.05


def test_unknown_family_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown family 'gausian'; did you mean gaussian\?"):
        find_family("gausian")
