"""The families of distributions a prompt can name: what a family is, and the table of all, one row per family.

Names, order and meaning of the parameters are the paper's (arXiv 2605.11845), because prompts print them. Mind that
gamma's `beta` is a scale, exponential's `lambda` a rate, the geometric starts at 1, the negative binomial counts the
failures before the r-th success, and the hypergeometric draws N from a population of M that holds K successes.

To add a family, add a row here and its grids in `grids.py`; prompts of it are made where a configuration names it.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

from scipy import stats

from cft_jax.common.errors import UserError

# What the paper trains on, and what it only tests.
TRAIN_FAMILIES: tuple[str, ...] = (
    *("uniform", "gaussian", "beta", "binomial", "exponential", "geometric", "negative_binomial", "lognormal"),
    *("triangular", "rayleigh", "cauchy", "student_t", "chi_square", "f_distribution", "gamma", "laplace"),
    *("logistic", "pareto", "hypergeometric", "gumbel", "skellam", "beta_binomial", "lomax", "inverse_gaussian"),
)
HELDOUT_FAMILIES: tuple[str, ...] = ("bernoulli", "poisson", "weibull", "maxwell", "chi", "truncnorm")


@dataclass(frozen=True)
class Rule:
    """What a parameter may be, or several together: `text` completes "sigma=-1 must be", "a=2, b=1 must satisfy"."""

    text: str
    accepts: Callable[..., bool]
    whole: bool = False


REAL = Rule("a finite number", lambda value: True)
POSITIVE = Rule("greater than 0", lambda value: value > 0)
PROBABILITY = Rule("between 0 and 1", lambda value: 0 <= value <= 1)
POSITIVE_PROBABILITY = Rule("greater than 0 and at most 1", lambda value: 0 < value <= 1)
COUNT = Rule("a whole number of at least 0", lambda value: value >= 0 and value == round(value), whole=True)
POSITIVE_COUNT = Rule("a whole number of at least 1", lambda value: value >= 1 and value == round(value), whole=True)


@dataclass(frozen=True)
class Family:
    """One family of distributions; its functions take the parameters in the order of the prompt.

    Attributes:
      family_id: the name in code, configs and files.
      display_name: the name printed in prompts.
      tier: the paper's grouping: I basic, II common, III specialised.
      rules: for every parameter, in the order of the prompt, what it may be.
      distribution: the distribution in `scipy.stats`.
      arguments_of: the parameters → keyword arguments of `distribution`.
      support_of: the parameters → smallest and largest value, -inf or inf where unbounded.
      grid: the axes of the family's grids, where they are not the parameters themselves.
      from_grid: values of those axes, in their order → values of the parameters.
      relations: conditions on several parameters.
      exact_quantiles: whether SciPy takes quantiles by sums, products and square roots alone, whose last digit is the
        same on every CPU.
    """

    family_id: str
    display_name: str
    tier: str
    rules: Mapping[str, Rule]
    distribution: Any
    arguments_of: Callable[..., dict[str, float]]
    support_of: Callable[..., tuple[float, float]]
    grid: tuple[str, ...] = ()
    from_grid: Callable[..., tuple[float, ...]] = lambda *values: values
    relations: tuple[Rule, ...] = ()
    exact_quantiles: bool = False

    @property
    def role(self) -> str:
        """The paper's use: `train`, or `heldout` where it is only tested; `own` for families that are not in it."""
        if self.family_id in TRAIN_FAMILIES:
            return "train"
        return "heldout" if self.family_id in HELDOUT_FAMILIES else "own"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters in the order in which prompts print them."""
        return tuple(self.rules)

    @property
    def grid_parameter_names(self) -> tuple[str, ...]:
        """The axes of the family's grids."""
        return self.grid or self.parameter_names

    @property
    def integer_only(self) -> bool:
        """Whether all values are integers."""
        return isinstance(self.distribution, stats.rv_discrete)

    @property
    def kind(self) -> str:
        """`discrete` for families of integers, else `continuous`."""
        return "discrete" if self.integer_only else "continuous"

    def prompt_parameters(self, grid_values: Mapping[str, float]) -> dict[str, float]:
        """The parameters, in the order of the prompt, at one point of a grid."""
        values = self.from_grid(*(grid_values[name] for name in self.grid_parameter_names))
        return dict(zip(self.parameter_names, map(float, values), strict=True))

    def validate(self, parameters: Mapping[str, Any]) -> None:
        """Checks names and values of the parameters.

        Raises:
          UserError: naming the family and, for every problem, the parameter, its value and the rule.
        """
        takes = f"it takes {', '.join(self.rules)}"
        problems = [f"parameter {name} is missing; {takes}" for name in self.rules if name not in parameters]
        problems += [f"unknown parameter {name}; {takes}" for name in parameters if name not in self.rules]
        problems = problems or self._value_problems(parameters)
        if problems:
            raise UserError(f"{self.family_id}: " + "; ".join(problems))

    def frozen(self, parameters: Mapping[str, Any]) -> Any:
        """The `scipy.stats` distribution with these parameters: cdf, sf, ppf, isf, pdf or pmf, rvs, mean, var.

        Raises:
          UserError: see `validate`.
        """
        self.validate(parameters)
        # Counts as integers: scipy's random numbers refuse floats there.
        given = zip(self._ordered(parameters), self.rules.values(), strict=True)
        return self.distribution(**self.arguments_of(*(int(value) if rule.whole else value for value, rule in given)))

    def support(self, parameters: Mapping[str, Any]) -> tuple[float, float]:
        """The smallest and the largest possible value; -inf or inf where unbounded.

        Raises:
          UserError: see `validate`.
        """
        self.validate(parameters)
        lower, upper = self.support_of(*self._ordered(parameters))
        return float(lower), float(upper)

    def _ordered(self, parameters: Mapping[str, Any]) -> list[float]:
        return [float(parameters[name]) for name in self.rules]

    def _value_problems(self, parameters: Mapping[str, Any]) -> list[str]:
        found = []
        for name, rule in self.rules.items():
            value = parameters[name]
            if not _is_finite_number(value):
                found.append(f"{name}={value!r} must be a finite number")
            elif not rule.accepts(value):
                found.append(f"{name}={float(value)!r} must be {rule.text}")
        if found:
            return found
        values = self._ordered(parameters)
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(self.rules, values, strict=True))
        return [f"{shown} must satisfy {r.text}" for r in self.relations if not r.accepts(*values)]


def _is_finite_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # an int beyond the range of doubles
        return False


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

_ROWS = (
    Family("uniform", "Uniform", "I", {"a": REAL, "b": REAL}, stats.uniform, lambda a, b: {"loc": a, "scale": b - a},
           lambda a, b: (a, b), grid=("a", "width"), from_grid=lambda a, width: (a, a + width),
           relations=(Rule("a < b", lambda a, b: a < b),), exact_quantiles=True),
    Family("gaussian", "Gaussian", "I", {"mu": REAL, "sigma": POSITIVE}, stats.norm, _named("loc", "scale"), _LINE),
    Family("bernoulli", "Bernoulli", "I", {"p": PROBABILITY}, stats.bernoulli, _named("p"), _UNIT),
    Family("beta", "Beta", "II", {"alpha": POSITIVE, "beta": POSITIVE}, stats.beta, _named("a", "b"), _UNIT),
    Family("binomial", "Binomial", "II", {"n": POSITIVE_COUNT, "p": PROBABILITY},
           stats.binom, _named("n", "p"), lambda n, p: (0.0, n)),
    Family("poisson", "Poisson", "II", {"lambda": POSITIVE}, stats.poisson, _named("mu"), _FROM_0),
    Family("exponential", "Exponential", "II", {"lambda": POSITIVE},
           stats.expon, lambda rate: {"scale": 1 / rate}, _FROM_0),
    Family("geometric", "Geometric", "II", {"p": POSITIVE_PROBABILITY}, stats.geom, _named("p"), _FROM_1),
    Family("negative_binomial", "Negative Binomial", "II", {"r": POSITIVE_COUNT, "p": POSITIVE_PROBABILITY},
           stats.nbinom, _named("n", "p"), _FROM_0),
    Family("lognormal", "LogNormal", "II", {"mu": REAL, "sigma": POSITIVE},
           stats.lognorm, lambda mu, sigma: {"s": sigma, "scale": math.exp(mu)}, _FROM_0,
           relations=(Rule("-700 <= mu <= 700 (exp(mu) is its median)", lambda mu, sigma: abs(mu) <= 700),)),
    Family("triangular", "Triangular", "II", {"a": REAL, "c": REAL, "b": REAL},
           stats.triang, lambda a, c, b: {"c": (c - a) / (b - a), "loc": a, "scale": b - a}, lambda a, c, b: (a, b),
           grid=("a", "width", "mode_fraction"), from_grid=lambda a, width, mode: (a, a + width * mode, a + width),
           relations=(Rule("a <= c <= b and a < b", lambda a, c, b: a <= c <= b and a < b),), exact_quantiles=True),
    Family("rayleigh", "Rayleigh", "II", {"sigma": POSITIVE}, stats.rayleigh, _named("scale"), _FROM_0),
    Family("cauchy", "Cauchy", "III", {"x0": REAL, "gamma": POSITIVE}, stats.cauchy, _named("loc", "scale"), _LINE),
    Family("student_t", "Student's t", "III", {"nu": POSITIVE}, stats.t, _named("df"), _LINE),
    Family("chi_square", "Chi-Square", "III", {"nu": POSITIVE}, stats.chi2, _named("df"), _FROM_0),
    Family("f_distribution", "F-Distribution", "III", {"d1": POSITIVE, "d2": POSITIVE},
           stats.f, _named("dfn", "dfd"), _FROM_0),
    Family("gamma", "Gamma", "III", {"alpha": POSITIVE, "beta": POSITIVE}, stats.gamma, _named("a", "scale"), _FROM_0),
    Family("weibull", "Weibull", "III", {"k": POSITIVE, "lambda": POSITIVE},
           stats.weibull_min, _named("c", "scale"), _FROM_0),
    Family("laplace", "Laplace", "III", {"mu": REAL, "b": POSITIVE}, stats.laplace, _named("loc", "scale"), _LINE),
    Family("logistic", "Logistic", "III", {"mu": REAL, "s": POSITIVE}, stats.logistic, _named("loc", "scale"), _LINE),
    Family("pareto", "Pareto", "III", {"alpha": POSITIVE, "xm": POSITIVE},
           stats.pareto, _named("b", "scale"), lambda alpha, xm: (xm, math.inf)),
    Family("hypergeometric", "Hypergeometric", "III", {"M": POSITIVE_COUNT, "K": COUNT, "N": COUNT},
           stats.hypergeom, _named("M", "n", "N"),
           lambda population, successes, draws: (max(0.0, draws - (population - successes)), min(draws, successes)),
           grid=("M", "N", "success_fraction"),
           from_grid=lambda population, draws, share: (population, round(population * share), min(draws, population)),
           relations=(Rule("K <= M", lambda population, successes, draws: successes <= population),
                      Rule("N <= M", lambda population, successes, draws: draws <= population))),
    Family("gumbel", "Gumbel", "III", {"mu": REAL, "beta": POSITIVE}, stats.gumbel_r, _named("loc", "scale"), _LINE),
    Family("skellam", "Skellam", "III", {"mu1": POSITIVE, "mu2": POSITIVE}, stats.skellam, _named("mu1", "mu2"), _LINE),
    Family("beta_binomial", "Beta-Binomial", "III", {"n": POSITIVE_COUNT, "alpha": POSITIVE, "beta": POSITIVE},
           stats.betabinom, _named("n", "a", "b"), lambda n, alpha, beta: (0.0, n)),
    Family("lomax", "Lomax", "III", {"alpha": POSITIVE, "lambda": POSITIVE},
           stats.lomax, _named("c", "scale"), _FROM_0),
    Family("inverse_gaussian", "Inverse Gaussian", "III", {"mu": POSITIVE, "lambda": POSITIVE},
           stats.invgauss, lambda mu, shape: {"mu": mu / shape, "scale": shape}, _FROM_0),
    Family("maxwell", "Maxwell", "II", {"scale": POSITIVE}, stats.maxwell, _named("scale"), _FROM_0),
    Family("chi", "Chi", "III", {"df": POSITIVE}, stats.chi, _named("df"), _FROM_0),
    Family("truncnorm", "TruncNorm", "II", {"mu": REAL, "sigma": POSITIVE, "lower": REAL, "upper": REAL},
           stats.truncnorm, lambda mu, sigma, lower, upper:
           {"a": (lower - mu) / sigma, "b": (upper - mu) / sigma, "loc": mu, "scale": sigma},
           lambda mu, sigma, lower, upper: (lower, upper),
           relations=(Rule("lower < upper", lambda mu, sigma, lower, upper: lower < upper),)),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({family.family_id: family for family in _ROWS})
