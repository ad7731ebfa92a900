"""What a family of distributions is: the rules of its parameters, its distribution in scipy, its support."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from scipy import stats

from cft_jax.common.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What one parameter may be; `text` completes "sigma=-1.0 must be ..."."""

    text: str
    accepts: Callable[[float], bool]
    whole: bool = False


REAL = Rule("a finite number", lambda value: True)
POSITIVE = Rule("greater than 0", lambda value: value > 0)
PROBABILITY = Rule("between 0 and 1", lambda value: 0 <= value <= 1)
POSITIVE_PROBABILITY = Rule("greater than 0 and at most 1", lambda value: 0 < value <= 1)
COUNT = Rule("a whole number of at least 0", lambda value: value >= 0 and value == round(value), whole=True)
POSITIVE_COUNT = Rule("a whole number of at least 1", lambda value: value >= 1 and value == round(value), whole=True)


@dataclass(frozen=True)
class Relation:
    """A condition on several parameters at once; `holds` takes them in the order of the prompt."""

    text: str
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Family:
    """One family of distributions.

    Attributes:
      family_id: the name in code, configs and files.
      display_name: the name printed in prompts.
      tier: the paper's grouping: I basic, II common, III specialised.
      role: the paper's use of it: `train`, or `heldout` for a family that is only tested; `own` for all others, which
        are trained on or tested where a configuration names them.
      rules: for every parameter, in the order of the prompt, what it may be.
      distribution: the distribution in `scipy.stats`.
      arguments_of: the parameters in the order of the prompt → keyword arguments of `distribution`.
      support_of: the parameters in the order of the prompt → smallest and largest value, -inf or inf where unbounded.
      relations: conditions on several parameters.
      grid_parameter_names: the axes of the family's grids.
      from_grid: values of those axes, in their order → values of the parameters, in the order of the prompt.
      exact_quantiles: whether SciPy takes quantiles by sums, products and square roots alone, whose last digit is the
        same on every CPU.
    """

    family_id: str
    display_name: str
    tier: str
    role: str
    rules: Mapping[str, Rule]
    distribution: Any
    arguments_of: Callable[..., dict[str, float]]
    support_of: Callable[..., tuple[float, float]]
    relations: tuple[Relation, ...]
    grid_parameter_names: tuple[str, ...]
    from_grid: Callable[..., tuple[float, ...]]
    exact_quantiles: bool = False

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters in the order in which prompts print them."""
        return tuple(self.rules)

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
        return dict(zip(self.parameter_names, (float(value) for value in values), strict=True))

    def validate(self, parameters: Mapping[str, Any]) -> None:
        """Checks names and values of the parameters.

        Raises:
          UserError: naming the family and, for every problem, the parameter, its value and the rule.
        """
        problems = self._name_problems(parameters) or self._value_problems(parameters)
        if problems:
            raise UserError(f"{self.family_id}: " + "; ".join(problems))

    def frozen(self, parameters: Mapping[str, Any]) -> Any:
        """The `scipy.stats` distribution with these parameters: cdf, sf, ppf, isf, pdf or pmf, rvs, mean, var.

        Raises:
          UserError: see `validate`.
        """
        self.validate(parameters)
        # Counts as integers: scipy's random numbers refuse floats there.
        values = [
            int(value) if rule.whole else value
            for value, rule in zip(self._ordered(parameters), self.rules.values(), strict=True)
        ]
        return self.distribution(**self.arguments_of(*values))

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

    def _name_problems(self, parameters: Mapping[str, Any]) -> list[str]:
        takes = f"it takes {', '.join(self.rules)}"
        found = [f"parameter {name} is missing; {takes}" for name in self.rules if name not in parameters]
        return found + [f"unknown parameter {name}; {takes}" for name in parameters if name not in self.rules]

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
        return [f"{shown} must satisfy {r.text}" for r in self.relations if not r.holds(*values)]


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an int beyond the range of doubles
        return False
