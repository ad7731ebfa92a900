"""The grids of parameters from which prompts are made: the paper's, as data, and grids denser, sparser or between."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from types import MappingProxyType

import numpy as np

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import FAMILIES, Family

# Far more digits than a double has, so that rounding to one is correct.
_PRECISE = Context(prec=60)


@dataclass(frozen=True)
class Axis:
    """The values of one grid parameter, ascending; `geometric` ones have midpoints in the geometric mean."""

    values: tuple[float, ...]
    geometric: bool = False

    def midpoints(self, *, whole: bool) -> "Axis":
        """An axis of the points half-way between neighbours; `whole` ones only where a whole number lies between."""
        found = []
        for left, right in itertools.pairwise(self.values):
            middle = math.sqrt(left * right) if self.geometric else (left + right) / 2
            if whole:
                middle = float(math.floor(middle))
            if left < middle < right:
                found.append(middle)
        return Axis(tuple(found), self.geometric)


def _linear(low: float | int, high: float | int, num_points: int) -> Axis:
    return Axis(tuple(np.linspace(low, high, num_points).tolist()))


def _log(low: float | int, high: float | int, num_points: int) -> Axis:
    """Equal ratios, the same on every machine: `numpy.geomspace` with correctly rounded log10 and 10**x.

    NumPy's own raise to powers in SIMD code whose last digit depends on the CPU; these numbers are printed in prompts.
    """
    log_low, log_high = (float(_PRECISE.log10(Decimal(end))) for end in (low, high))
    exponents = _linear(log_low, log_high, num_points).values[1:-1]
    inner = (float(_PRECISE.power(10, Decimal(exponent))) for exponent in exponents)
    return Axis((float(low), *inner, float(high)), geometric=True)


def _listed(*values: float | int) -> Axis:
    return Axis(tuple(map(float, values)))


@dataclass(frozen=True)
class FamilyGrids:
    """The grids of one family, each a tuple of axes in the order of the family's `grid_parameter_names`.

    Attributes:
      main: what the paper trains on; for a held-out family what it tests.
      beyond: the paper's unseen parameters, outside the ranges of `main`; empty for held-out families.
      selected: the few points of the paper's evaluation, in place of `beyond` or, for held-out families, of `main`.
    """

    main: tuple[Axis, ...]
    beyond: tuple[Axis, ...]
    selected: tuple[tuple[float, ...], ...]


def resampled(family: Family, axes: tuple[Axis, ...], num_points: int) -> tuple[Axis, ...]:
    """The same ranges with `num_points` values per axis, spaced as these are (listed values: evenly).

    A parameter that must be whole gets the distinct whole numbers nearest to them.
    """
    if num_points < 2:
        raise UserError(f"grid_points={num_points} must be at least 2 (0: the paper's grids)")
    found = []
    for axis, whole in zip(axes, _whole(family), strict=True):
        points = (_log if axis.geometric else _linear)(axis.values[0], axis.values[-1], num_points).values
        if whole:
            points = tuple(sorted({float(round(point)) for point in points}))
        found.append(Axis(points, axis.geometric))
    return tuple(found)


def between(family: Family, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The grid of midpoints: every parameter lies half-way between two neighbouring values of `axes`.

    A parameter that must be whole keeps the values of `axes` where no whole numbers lie between them.

    Raises:
      UserError: no parameter has room between its values.
    """
    middle = [axis.midpoints(whole=whole) for axis, whole in zip(axes, _whole(family), strict=True)]
    if not any(axis.values for axis in middle):
        raise UserError(
            f"{family.family_id}: no value lies between the grid's values of "
            f"{', '.join(family.grid_parameter_names)}; take fewer grid points, or unseen=outside"
        )
    return tuple(new if new.values else old for new, old in zip(middle, axes, strict=True))


def _whole(family: Family) -> list[bool]:
    """Per axis, whether it is a parameter that must be whole."""
    return [name in family.rules and family.rules[name].whole for name in family.grid_parameter_names]


_SUCCESS = _listed(0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8)
_LOCATION_SCALE = FamilyGrids(
    (_linear(-2, 2, 11), _log(0.5, 2, 11)), (_linear(2.5, 4, 6), _log(2.25, 3.5, 6)), ((3.5, 3.0),)
)

# fmt: off
GRIDS: Mapping[str, FamilyGrids] = MappingProxyType(
    {
        "uniform": FamilyGrids((_linear(-5, 2, 11), _linear(1, 5, 11)), (_linear(2.5, 4.5, 6), _linear(5.5, 8, 6)),
                               ((3.5, 7.0),)),
        "gaussian": _LOCATION_SCALE,
        "bernoulli": FamilyGrids((_listed(0.1, 0.3, 0.5, 0.7, 0.9),), (), ((0.1,), (0.5,), (0.9,))),
        "beta": FamilyGrids((_log(0.5, 5, 11), _log(0.5, 5, 11)), (_log(5.5, 8, 6), _log(5.5, 8, 6)), ((7.0, 7.0),)),
        "binomial": FamilyGrids((_listed(5, 10, 15, 20), _SUCCESS),
                                (_listed(25, 30), _listed(0.25, 0.4, 0.5, 0.6, 0.75)), ((25.0, 0.5),)),
        "poisson": FamilyGrids((_log(1, 12, 17),), (), ((1.0,), (4.0,), (12.0,))),
        "exponential": FamilyGrids((_log(0.5, 5, 25),), (_log(5.5, 8, 12),), ((7.0,),)),
        "geometric": FamilyGrids((_listed(0.2, 0.225, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.775, 0.8),),
                                 (_listed(0.05, 0.075, 0.1, 0.125, 0.15, 0.85, 0.875, 0.9, 0.925, 0.95),), ((0.125,),)),
        "negative_binomial": FamilyGrids((_listed(3, 5, 8, 12), _SUCCESS),
                                         (_listed(15, 20), _listed(0.1, 0.15, 0.2, 0.8, 0.85, 0.9)), ((15.0, 0.15),)),
        "lognormal": FamilyGrids((_linear(-1, 1.5, 11), _log(0.25, 1.25, 11)),
                                 (_linear(1.75, 3, 6), _log(1.5, 2.25, 6)), ((2.5, 2.0),)),
        "triangular": FamilyGrids((_linear(-3, 1, 5), _linear(1, 5, 5), _listed(0.1, 0.3, 0.5, 0.7, 0.9)),
                                  (_linear(1.5, 3.5, 3), _linear(5.5, 8, 3), _listed(0.1, 0.5, 0.9)),
                                  ((2.5, 7.0, 0.5),)),
        "rayleigh": FamilyGrids((_log(0.5, 2, 25),), (_log(2.25, 3.5, 12),), ((3.0,),)),
        "cauchy": _LOCATION_SCALE,
        "student_t": FamilyGrids((_listed(2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 10),),
                                 (_listed(10.5, 12, 14, 16, 18, 20),), ((16.0,),)),
        "chi_square": FamilyGrids((_listed(2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20),),
                                  (_listed(21, 24, 28, 32, 36, 40),), ((32.0,),)),
        "f_distribution": FamilyGrids((_listed(3, 5, 7, 10), _listed(5, 10, 15, 20)),
                                      (_listed(12, 15), _listed(24, 30)), ((12.0, 24.0),)),
        "gamma": FamilyGrids((_log(1, 5, 11), _log(1, 5, 11)), (_log(5.5, 8, 6), _log(5.5, 8, 6)), ((7.0, 7.0),)),
        "weibull": FamilyGrids((_log(0.5, 3, 6), _log(0.5, 3, 6)), (), ((0.5, 0.5), (1.5, 1.5), (3.0, 3.0))),
        "laplace": _LOCATION_SCALE,
        "logistic": _LOCATION_SCALE,
        "pareto": FamilyGrids((_listed(2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5), _log(0.5, 2, 11)),
                              (_listed(5.5, 6, 6.5, 7, 8), _log(2.5, 4, 6)), ((6.5, 3.5),)),
        "hypergeometric": FamilyGrids((_listed(30, 50, 80), _listed(5, 10, 15), _listed(0.2, 0.35, 0.5, 0.65, 0.8)),
                                      (_listed(100, 120), _listed(20, 25), _listed(0.2, 0.5, 0.8)),
                                      ((100.0, 20.0, 0.5),)),
        "gumbel": _LOCATION_SCALE,
        "skellam": FamilyGrids((_log(1, 8, 11), _log(1, 8, 11)), (_log(8.5, 12, 6), _log(8.5, 12, 6)), ((10.5, 10.5),)),
        "beta_binomial": FamilyGrids((_listed(10, 20, 30), _log(0.5, 5, 5), _log(0.5, 5, 5)),
                                     (_listed(40, 50), _log(5.5, 8, 3), _log(5.5, 8, 3)), ((40.0, 6.5, 6.5),)),
        "lomax": FamilyGrids((_log(1.5, 4, 11), _log(0.5, 3, 11)), (_log(4.5, 7, 6), _log(3.5, 5, 6)), ((6.0, 4.5),)),
        "inverse_gaussian": FamilyGrids((_log(0.5, 3, 11), _log(0.5, 5, 11)), (_log(3.5, 6, 6), _log(5.5, 8, 6)),
                                        ((5.0, 7.0),)),
        "maxwell": FamilyGrids((_listed(0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5),), (), ((0.75,), (1.5,), (2.5,))),
        "chi": FamilyGrids((_listed(1.5, 2, 3, 4, 5, 7, 10, 14, 20),), (), ((2.0,), (5.0,), (10.0,))),
        "truncnorm": FamilyGrids((_listed(0, 1), _listed(1, 1.5), _listed(-2, -1), _listed(1, 2)), (),
                                 ((0.0, 1.0, -1.0, 1.0), (0.0, 1.0, -2.0, 2.0), (1.0, 1.5, -1.0, 2.0))),
    }
)
# fmt: on

if set(GRIDS) != set(FAMILIES):
    raise ValueError(f"families without grids or grids without a family: {set(GRIDS) ^ set(FAMILIES)}")
