"""The families of distributions a prompt can name: data, one row per family, and small functions of the parameters.

Names, order and meaning of the parameters are the paper's (arXiv 2605.11845), because prompts print them. Mind that
gamma's `beta` is a scale, exponential's `lambda` a rate, the geometric starts at 1, the negative binomial counts the
failures before the r-th success, and the hypergeometric draws N from a population of M that holds K successes.

To add a family, add a row here and its grids in `grids.py`.
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


def _real_line(*parameters: float) -> tuple[float, float]:
    return -math.inf, math.inf


def _from_zero(*parameters: float) -> tuple[float, float]:
    return 0.0, math.inf


def _from_one(*parameters: float) -> tuple[float, float]:
    return 1.0, math.inf


def _unit_interval(*parameters: float) -> tuple[float, float]:
    return 0.0, 1.0


def _as_they_are(*values: float) -> tuple[float, ...]:
    return values


def _family(
    row: tuple[str, str, str, str, str],
    rules: Mapping[str, Rule],
    distribution: Any,
    arguments_of: Callable[..., dict[str, float]],
    support_of: Callable[..., tuple[float, float]],
    *,
    relations: tuple[Relation, ...] = (),
    grid_parameter_names: tuple[str, ...] = (),
    from_grid: Callable[..., tuple[float, ...]] = _as_they_are,
    exact_quantiles: bool = False,
) -> Family:
    """A row of the table; the axes of a grid are the parameters themselves unless said otherwise."""
    axes = grid_parameter_names or tuple(rules)
    return Family(*row, rules, distribution, arguments_of, support_of, relations, axes, from_grid, exact_quantiles)


def _triangular_from_grid(a: float, width: float, mode_fraction: float) -> tuple[float, float, float]:
    return a, a + width * mode_fraction, a + width


def _hypergeometric_from_grid(population: float, draws: float, success_fraction: float) -> tuple[float, float, float]:
    return population, float(round(population * success_fraction)), min(draws, population)


_ROWS = (
    _family(
        ("uniform", "Uniform", "I", "continuous", "train"),
        {"a": REAL, "b": REAL},
        stats.uniform,
        lambda a, b: {"loc": a, "scale": b - a},
        lambda a, b: (a, b),
        relations=(Relation("a < b", lambda a, b: a < b),),
        grid_parameter_names=("a", "width"),
        from_grid=lambda a, width: (a, a + width),
        exact_quantiles=True,
    ),
    _family(
        ("gaussian", "Gaussian", "I", "continuous", "train"),
        {"mu": REAL, "sigma": POSITIVE},
        stats.norm,
        lambda mu, sigma: {"loc": mu, "scale": sigma},
        _real_line,
    ),
    _family(
        ("bernoulli", "Bernoulli", "I", "discrete", "heldout"),
        {"p": PROBABILITY},
        stats.bernoulli,
        lambda p: {"p": p},
        _unit_interval,
    ),
    _family(
        ("beta", "Beta", "II", "continuous", "train"),
        {"alpha": POSITIVE, "beta": POSITIVE},
        stats.beta,
        lambda alpha, beta: {"a": alpha, "b": beta},
        _unit_interval,
    ),
    _family(
        ("binomial", "Binomial", "II", "discrete", "train"),
        {"n": POSITIVE_COUNT, "p": PROBABILITY},
        stats.binom,
        lambda n, p: {"n": n, "p": p},
        lambda n, p: (0.0, n),
    ),
    _family(
        ("poisson", "Poisson", "II", "discrete", "heldout"),
        {"lambda": POSITIVE},
        stats.poisson,
        lambda rate: {"mu": rate},
        _from_zero,
    ),
    _family(
        ("exponential", "Exponential", "II", "continuous", "train"),
        {"lambda": POSITIVE},
        stats.expon,
        lambda rate: {"scale": 1 / rate},
        _from_zero,
    ),
    _family(
        ("geometric", "Geometric", "II", "discrete", "train"),
        {"p": POSITIVE_PROBABILITY},
        stats.geom,
        lambda p: {"p": p},
        _from_one,
    ),
    _family(
        ("negative_binomial", "Negative Binomial", "II", "discrete", "train"),
        {"r": POSITIVE_COUNT, "p": POSITIVE_PROBABILITY},
        stats.nbinom,
        lambda r, p: {"n": r, "p": p},
        _from_zero,
    ),
    _family(
        ("lognormal", "LogNormal", "II", "continuous", "train"),
        {"mu": REAL, "sigma": POSITIVE},
        stats.lognorm,
        lambda mu, sigma: {"s": sigma, "scale": math.exp(mu)},
        _from_zero,
        relations=(Relation("-700 <= mu <= 700 (exp(mu) is its median)", lambda mu, sigma: abs(mu) <= 700),),
    ),
    _family(
        ("triangular", "Triangular", "II", "continuous", "train"),
        {"a": REAL, "c": REAL, "b": REAL},
        stats.triang,
        lambda a, c, b: {"c": (c - a) / (b - a), "loc": a, "scale": b - a},
        lambda a, c, b: (a, b),
        relations=(Relation("a <= c <= b and a < b", lambda a, c, b: a <= c <= b and a < b),),
        grid_parameter_names=("a", "width", "mode_fraction"),
        from_grid=_triangular_from_grid,
        exact_quantiles=True,
    ),
    _family(
        ("rayleigh", "Rayleigh", "II", "continuous", "train"),
        {"sigma": POSITIVE},
        stats.rayleigh,
        lambda sigma: {"scale": sigma},
        _from_zero,
    ),
    _family(
        ("cauchy", "Cauchy", "III", "continuous", "train"),
        {"x0": REAL, "gamma": POSITIVE},
        stats.cauchy,
        lambda x0, gamma: {"loc": x0, "scale": gamma},
        _real_line,
    ),
    _family(
        ("student_t", "Student's t", "III", "continuous", "train"),
        {"nu": POSITIVE},
        stats.t,
        lambda nu: {"df": nu},
        _real_line,
    ),
    _family(
        ("chi_square", "Chi-Square", "III", "continuous", "train"),
        {"nu": POSITIVE},
        stats.chi2,
        lambda nu: {"df": nu},
        _from_zero,
    ),
    _family(
        ("f_distribution", "F-Distribution", "III", "continuous", "train"),
        {"d1": POSITIVE, "d2": POSITIVE},
        stats.f,
        lambda d1, d2: {"dfn": d1, "dfd": d2},
        _from_zero,
    ),
    _family(
        ("gamma", "Gamma", "III", "continuous", "train"),
        {"alpha": POSITIVE, "beta": POSITIVE},
        stats.gamma,
        lambda alpha, beta: {"a": alpha, "scale": beta},
        _from_zero,
    ),
    _family(
        ("weibull", "Weibull", "III", "continuous", "heldout"),
        {"k": POSITIVE, "lambda": POSITIVE},
        stats.weibull_min,
        lambda k, scale: {"c": k, "scale": scale},
        _from_zero,
    ),
    _family(
        ("laplace", "Laplace", "III", "continuous", "train"),
        {"mu": REAL, "b": POSITIVE},
        stats.laplace,
        lambda mu, b: {"loc": mu, "scale": b},
        _real_line,
    ),
    _family(
        ("logistic", "Logistic", "III", "continuous", "train"),
        {"mu": REAL, "s": POSITIVE},
        stats.logistic,
        lambda mu, s: {"loc": mu, "scale": s},
        _real_line,
    ),
    _family(
        ("pareto", "Pareto", "III", "continuous", "train"),
        {"alpha": POSITIVE, "xm": POSITIVE},
        stats.pareto,
        lambda alpha, xm: {"b": alpha, "scale": xm},
        lambda alpha, xm: (xm, math.inf),
    ),
    _family(
        ("hypergeometric", "Hypergeometric", "III", "discrete", "train"),
        {"M": POSITIVE_COUNT, "K": COUNT, "N": COUNT},
        stats.hypergeom,
        lambda population, successes, draws: {"M": population, "n": successes, "N": draws},
        lambda population, successes, draws: (max(0.0, draws - (population - successes)), min(draws, successes)),
        relations=(
            Relation("K <= M", lambda population, successes, draws: successes <= population),
            Relation("N <= M", lambda population, successes, draws: draws <= population),
        ),
        grid_parameter_names=("M", "N", "success_fraction"),
        from_grid=_hypergeometric_from_grid,
    ),
    _family(
        ("gumbel", "Gumbel", "III", "continuous", "train"),
        {"mu": REAL, "beta": POSITIVE},
        stats.gumbel_r,
        lambda mu, beta: {"loc": mu, "scale": beta},
        _real_line,
    ),
    _family(
        ("skellam", "Skellam", "III", "discrete", "train"),
        {"mu1": POSITIVE, "mu2": POSITIVE},
        stats.skellam,
        lambda mu1, mu2: {"mu1": mu1, "mu2": mu2},
        _real_line,
    ),
    _family(
        ("beta_binomial", "Beta-Binomial", "III", "discrete", "train"),
        {"n": POSITIVE_COUNT, "alpha": POSITIVE, "beta": POSITIVE},
        stats.betabinom,
        lambda n, alpha, beta: {"n": n, "a": alpha, "b": beta},
        lambda n, alpha, beta: (0.0, n),
    ),
    _family(
        ("lomax", "Lomax", "III", "continuous", "train"),
        {"alpha": POSITIVE, "lambda": POSITIVE},
        stats.lomax,
        lambda alpha, scale: {"c": alpha, "scale": scale},
        _from_zero,
    ),
    _family(
        ("inverse_gaussian", "Inverse Gaussian", "III", "continuous", "train"),
        {"mu": POSITIVE, "lambda": POSITIVE},
        stats.invgauss,
        lambda mu, shape: {"mu": mu / shape, "scale": shape},
        _from_zero,
    ),
    _family(
        ("maxwell", "Maxwell", "II", "continuous", "heldout"),
        {"scale": POSITIVE},
        stats.maxwell,
        lambda scale: {"scale": scale},
        _from_zero,
    ),
    _family(
        ("chi", "Chi", "III", "continuous", "heldout"),
        {"df": POSITIVE},
        stats.chi,
        lambda df: {"df": df},
        _from_zero,
    ),
    _family(
        ("truncnorm", "TruncNorm", "II", "continuous", "heldout"),
        {"mu": REAL, "sigma": POSITIVE, "lower": REAL, "upper": REAL},
        stats.truncnorm,
        lambda mu, sigma, lower, upper: {
            "a": (lower - mu) / sigma,
            "b": (upper - mu) / sigma,
            "loc": mu,
            "scale": sigma,
        },
        lambda mu, sigma, lower, upper: (lower, upper),
        relations=(Relation("lower < upper", lambda mu, sigma, lower, upper: lower < upper),),
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.family_id: family for family in _ROWS})
TRAIN_FAMILIES: tuple[str, ...] = tuple(name for name, family in FAMILIES.items() if family.role == "train")
HELDOUT_FAMILIES: tuple[str, ...] = tuple(name for name, family in FAMILIES.items() if family.role == "heldout")
