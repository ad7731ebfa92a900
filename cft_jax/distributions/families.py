"""The families of distributions a prompt can name: data, one row per family, and small functions of the parameters.

Names, order and meaning of the parameters are the paper's (arXiv 2605.11845), because prompts print them. Mind that
gamma's `beta` is a scale, exponential's `lambda` a rate, the geometric starts at 1, the negative binomial counts the
failures before the r-th success, and the hypergeometric draws N from a population of M that holds K successes.

To add a family, add a row here and its grids in `grids.py`; prompts of it are made where a configuration names it.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.distributions.family import (
    COUNT,
    POSITIVE,
    POSITIVE_COUNT,
    POSITIVE_PROBABILITY,
    PROBABILITY,
    REAL,
    Family,
    Relation,
    Rule,
)

# What the paper trains on, and what it only tests.
TRAIN_FAMILIES: tuple[str, ...] = (
    *("uniform", "gaussian", "beta", "binomial", "exponential", "geometric", "negative_binomial", "lognormal"),
    *("triangular", "rayleigh", "cauchy", "student_t", "chi_square", "f_distribution", "gamma", "laplace"),
    *("logistic", "pareto", "hypergeometric", "gumbel", "skellam", "beta_binomial", "lomax", "inverse_gaussian"),
)
HELDOUT_FAMILIES: tuple[str, ...] = ("bernoulli", "poisson", "weibull", "maxwell", "chi", "truncnorm")


def find_family(family_id: str) -> Family:
    """The family of this id.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    if family_id in FAMILIES:
        return FAMILIES[family_id]
    near = difflib.get_close_matches(family_id, FAMILIES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"families are {', '.join(FAMILIES)}"
    raise UserError(f"unknown family {family_id!r}; {hint}")


def _named(*names: str) -> Callable[..., dict[str, float]]:
    """Arguments of SciPy that are the parameters themselves, in their order."""
    return lambda *parameters: dict(zip(names, parameters, strict=True))


def _always(lower: float, upper: float) -> Callable[..., tuple[float, float]]:
    """A support that does not depend on the parameters."""
    return lambda *_: (lower, upper)


_LINE, _FROM_0, _FROM_1 = _always(-math.inf, math.inf), _always(0.0, math.inf), _always(1.0, math.inf)
_UNIT = _always(0.0, 1.0)


def _family(
    family_id: str,
    display_name: str,
    tier: str,
    rules: Mapping[str, Rule],
    distribution: Any,
    arguments_of: Callable[..., dict[str, float]],
    support_of: Callable[..., tuple[float, float]],
    *,
    grid: tuple[str, ...] = (),
    from_grid: Callable[..., tuple[float, ...]] = lambda *values: values,
    relations: tuple[Relation, ...] = (),
    exact_quantiles: bool = False,
) -> Family:
    """A row of the table; the axes of a grid are the parameters themselves unless `grid` names others."""
    role = "train" if family_id in TRAIN_FAMILIES else "heldout" if family_id in HELDOUT_FAMILIES else "own"
    names = family_id, display_name, tier, role
    axes = grid or tuple(rules)
    return Family(*names, rules, distribution, arguments_of, support_of, relations, axes, from_grid, exact_quantiles)


_ROWS = (
    _family(
        "uniform", "Uniform", "I", {"a": REAL, "b": REAL}, stats.uniform, lambda a, b: {"loc": a, "scale": b - a},
        lambda a, b: (a, b), grid=("a", "width"), from_grid=lambda a, width: (a, a + width),
        relations=(Relation("a < b", lambda a, b: a < b),), exact_quantiles=True,
    ),
    _family("gaussian", "Gaussian", "I", {"mu": REAL, "sigma": POSITIVE}, stats.norm, _named("loc", "scale"), _LINE),
    _family("bernoulli", "Bernoulli", "I", {"p": PROBABILITY}, stats.bernoulli, _named("p"), _UNIT),
    _family("beta", "Beta", "II", {"alpha": POSITIVE, "beta": POSITIVE}, stats.beta, _named("a", "b"), _UNIT),
    _family(
        "binomial", "Binomial", "II", {"n": POSITIVE_COUNT, "p": PROBABILITY}, stats.binom, _named("n", "p"),
        lambda n, p: (0.0, n),
    ),
    _family("poisson", "Poisson", "II", {"lambda": POSITIVE}, stats.poisson, _named("mu"), _FROM_0),
    _family(
        "exponential", "Exponential", "II", {"lambda": POSITIVE}, stats.expon, lambda rate: {"scale": 1 / rate}, _FROM_0
    ),
    _family("geometric", "Geometric", "II", {"p": POSITIVE_PROBABILITY}, stats.geom, _named("p"), _FROM_1),
    _family(
        "negative_binomial", "Negative Binomial", "II", {"r": POSITIVE_COUNT, "p": POSITIVE_PROBABILITY}, stats.nbinom,
        _named("n", "p"), _FROM_0,
    ),
    _family(
        "lognormal", "LogNormal", "II", {"mu": REAL, "sigma": POSITIVE}, stats.lognorm,
        lambda mu, sigma: {"s": sigma, "scale": math.exp(mu)}, _FROM_0,
        relations=(Relation("-700 <= mu <= 700 (exp(mu) is its median)", lambda mu, sigma: abs(mu) <= 700),),
    ),
    _family(
        "triangular", "Triangular", "II", {"a": REAL, "c": REAL, "b": REAL}, stats.triang,
        lambda a, c, b: {"c": (c - a) / (b - a), "loc": a, "scale": b - a}, lambda a, c, b: (a, b),
        grid=("a", "width", "mode_fraction"), from_grid=lambda a, width, mode: (a, a + width * mode, a + width),
        relations=(Relation("a <= c <= b and a < b", lambda a, c, b: a <= c <= b and a < b),), exact_quantiles=True,
    ),
    _family("rayleigh", "Rayleigh", "II", {"sigma": POSITIVE}, stats.rayleigh, _named("scale"), _FROM_0),
    _family("cauchy", "Cauchy", "III", {"x0": REAL, "gamma": POSITIVE}, stats.cauchy, _named("loc", "scale"), _LINE),
    _family("student_t", "Student's t", "III", {"nu": POSITIVE}, stats.t, _named("df"), _LINE),
    _family("chi_square", "Chi-Square", "III", {"nu": POSITIVE}, stats.chi2, _named("df"), _FROM_0),
    _family(
        "f_distribution", "F-Distribution", "III", {"d1": POSITIVE, "d2": POSITIVE}, stats.f, _named("dfn", "dfd"),
        _FROM_0,
    ),
    _family(
        "gamma", "Gamma", "III", {"alpha": POSITIVE, "beta": POSITIVE}, stats.gamma, _named("a", "scale"), _FROM_0
    ),
    _family(
        "weibull", "Weibull", "III", {"k": POSITIVE, "lambda": POSITIVE}, stats.weibull_min, _named("c", "scale"),
        _FROM_0,
    ),
    _family("laplace", "Laplace", "III", {"mu": REAL, "b": POSITIVE}, stats.laplace, _named("loc", "scale"), _LINE),
    _family("logistic", "Logistic", "III", {"mu": REAL, "s": POSITIVE}, stats.logistic, _named("loc", "scale"), _LINE),
    _family(
        "pareto", "Pareto", "III", {"alpha": POSITIVE, "xm": POSITIVE}, stats.pareto, _named("b", "scale"),
        lambda alpha, xm: (xm, math.inf),
    ),
    _family(
        "hypergeometric", "Hypergeometric", "III", {"M": POSITIVE_COUNT, "K": COUNT, "N": COUNT}, stats.hypergeom,
        _named("M", "n", "N"),
        lambda population, successes, draws: (max(0.0, draws - (population - successes)), min(draws, successes)),
        grid=("M", "N", "success_fraction"),
        from_grid=lambda population, draws, share: (population, round(population * share), min(draws, population)),
        relations=(
            Relation("K <= M", lambda population, successes, draws: successes <= population),
            Relation("N <= M", lambda population, successes, draws: draws <= population),
        ),
    ),
    _family("gumbel", "Gumbel", "III", {"mu": REAL, "beta": POSITIVE}, stats.gumbel_r, _named("loc", "scale"), _LINE),
    _family(
        "skellam", "Skellam", "III", {"mu1": POSITIVE, "mu2": POSITIVE}, stats.skellam, _named("mu1", "mu2"), _LINE
    ),
    _family(
        "beta_binomial", "Beta-Binomial", "III", {"n": POSITIVE_COUNT, "alpha": POSITIVE, "beta": POSITIVE},
        stats.betabinom, _named("n", "a", "b"), lambda n, alpha, beta: (0.0, n),
    ),
    _family(
        "lomax", "Lomax", "III", {"alpha": POSITIVE, "lambda": POSITIVE}, stats.lomax, _named("c", "scale"), _FROM_0
    ),
    _family(
        "inverse_gaussian", "Inverse Gaussian", "III", {"mu": POSITIVE, "lambda": POSITIVE}, stats.invgauss,
        lambda mu, shape: {"mu": mu / shape, "scale": shape}, _FROM_0,
    ),
    _family("maxwell", "Maxwell", "II", {"scale": POSITIVE}, stats.maxwell, _named("scale"), _FROM_0),
    _family("chi", "Chi", "III", {"df": POSITIVE}, stats.chi, _named("df"), _FROM_0),
    _family(
        "truncnorm", "TruncNorm", "II", {"mu": REAL, "sigma": POSITIVE, "lower": REAL, "upper": REAL}, stats.truncnorm,
        lambda mu, sigma, lower, upper: {
            "a": (lower - mu) / sigma, "b": (upper - mu) / sigma, "loc": mu, "scale": sigma
        },
        lambda mu, sigma, lower, upper: (lower, upper),
        relations=(Relation("lower < upper", lambda mu, sigma, lower, upper: lower < upper),),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({family.family_id: family for family in _ROWS})
