"""Output spaces at full resolution: every string of the given decimals between the bounds, none of them listed.

The string of the integer k stands for k * 10**-d and has the mass between (k - 1/2) * 10**-d and (k + 1/2) * 10**-d
(integer families: the mass of k); there is no "-0". The bounds are those of the support where finite, else far
quantiles, and what lies beyond them belongs to the end strings. The mass of any interval of integers is a difference
of the cdf, or above the median of the survival function, which keeps the upper tail's digits.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import find_family
from cft_jax.distributions.output_space import decimal_strings
from cft_jax.distributions.splits import PromptSpec

# The integers k keep to 18 digits, so that sums and products with powers of ten stay in int64.
LARGEST_INTEGER = 10**18 - 1
MAX_DECIMALS = 17
# Integer families of more values than this are summed by their cdf instead of a table of their masses.
_LARGEST_TABLE = 2**20
# Below this share of the cdf, a difference of two cdf values has lost more than density times width does.
_CANCELLATION = 1e-7
# ... for intervals this narrow: the density is close to linear across 1/10,000 of the range.
_NARROW = 1e-4
# SciPy meets infinities on its way to finite results, such as those of a geometric distribution with p = 1.
_calling_scipy = np.errstate(over="ignore", divide="ignore")


@dataclass(frozen=True, eq=False)
class AnalyticSpace:
    """The strings of the integers k from `first` to `last`, k standing for k * 10**-num_decimals.

    Intervals are half-open: [start, stop) holds the integers start ≤ k < stop.

    Attributes:
      distribution: the `scipy.stats` distribution of the family.
      integer_only: whether the family is one of integers (then `num_decimals` is 0).
      num_decimals: decimals of every string.
      first, last: the smallest and the largest k.
      lower_bound, upper_bound: the bounds before rounding to decimals.
    """

    distribution: Any
    integer_only: bool
    num_decimals: int
    first: int
    last: int
    lower_bound: float
    upper_bound: float

    @property
    def num_values(self) -> int:
        """Number of strings."""
        return self.last - self.first + 1

    def strings(self, integers: Int[np.ndarray, "N"]) -> list[str]:
        """The strings of these k."""
        return decimal_strings(integers, self.num_decimals)

    def numbers(self, integers: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """The numbers k * 10**-num_decimals, rounded to doubles as reading the strings would (|k| < 2**53)."""
        return integers / 10.0**self.num_decimals

    @_calling_scipy
    def draw(self, uniforms: Float[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """The k at these quantiles: the inverse transform of uniform numbers in [0, 1).

        Beyond 2**53 a k has the resolution of a double.
        """
        if self._table is not None:
            masses, above = self._table
            below = np.where(above, 1 + masses, masses)[1:-1]
            return self.first + np.searchsorted(below, uniforms, side="right")
        lower = uniforms < 0.5
        values = np.empty(uniforms.shape)
        values[lower] = self.distribution.ppf(uniforms[lower])
        values[~lower] = self.distribution.isf(1 - uniforms[~lower])
        scaled = np.floor(values * 10.0**self.num_decimals + 0.5)
        # Clipped before the cast, which infinities would not survive, and after it, as doubles round the bounds.
        return np.clip(np.clip(scaled, self.first, self.last).astype(np.int64), self.first, self.last)

    def interval_masses(self, start: Int[np.ndarray, "N"], stop: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """The probabilities of the strings start ≤ k < stop."""
        indices = np.arange(start.size)
        return self.masses(np.concatenate([start, stop]), indices, indices + start.size)

    @_calling_scipy
    def masses(
        self, edges: Int[np.ndarray, "E"], lower: Int[np.ndarray, "N"], upper: Int[np.ndarray, "N"]
    ) -> Float[np.ndarray, "N"]:
        """The probabilities of the intervals [edges[lower], edges[upper]), whose edges may be shared.

        Intervals reach into the space only as far as it goes: beyond `first` and `last` there is nothing.
        """
        cumulative, above = self._cumulative(edges)
        below, upto = cumulative[lower], cumulative[upper]
        masses = upto - below + (above[upper] & ~above[lower])
        if self.integer_only:
            return np.maximum(masses, 0)
        start, stop = edges[lower], edges[upper]
        thin = (
            (masses < _CANCELLATION * np.maximum(np.abs(below), np.abs(upto)))
            & (stop - start < _NARROW * self.num_values)
            & (start > self.first)
            & (stop <= self.last)
        )
        if thin.any():
            start, stop = start[thin], stop[thin]
            middle = (start + stop - 1) / (2 * 10.0**self.num_decimals)
            masses[thin] = self.distribution.pdf(middle) * ((stop - start) / 10.0**self.num_decimals)
        return np.maximum(masses, 0)

    @cached_property
    def entropy(self) -> float:
        """Entropy of the strings, in nats.

        Exact up to 2**16 strings. Beyond, the strings of an interval are taken as equally probable, for some 70,000
        intervals; the intervals are narrow wherever there is mass (relative error below 1e-6 for all families).
        """
        if self.num_values <= 2**16:
            edges = np.arange(self.first, self.last + 2)
        else:
            grid = np.concatenate([np.arange(1, 2**15) / 2**16, np.geomspace(1e-12, 1e-3, 2**10)])
            quantiles = self.draw(np.concatenate([grid, 1 - grid]))
            ends = [self.first, self.first + 1, self.last, self.last + 1]
            edges = np.unique(np.concatenate([quantiles, ends]))
        masses = self.interval_masses(edges[:-1], edges[1:])
        masses, sizes = masses[masses > 0], np.diff(edges)[masses > 0]
        return max(0.0, float(-(masses * np.log(masses / sizes)).sum()))

    def _cumulative(self, edges: np.ndarray) -> tuple[Float[np.ndarray, "E"], Bool[np.ndarray, "E"]]:
        """Per edge, P(below) and False up to the median, minus P(from there on) and True above it."""
        if self._table is not None:
            masses, above = self._table
            index = np.clip(edges, self.first, self.last + 1) - self.first
            return masses[index], above[index]
        cumulative = np.zeros(edges.shape)
        above = edges > self.last
        inside = np.flatnonzero((edges > self.first) & ~above)
        # (k - 1/2) * 10**-d, correctly rounded; an integer family's cdf at k - 1/2 is that at k - 1.
        points = (2 * edges[inside] - 1) / (2 * 10.0**self.num_decimals)
        high = points > self._median
        above[inside] = high
        low = ~high
        if low.any():
            cumulative[inside[low]] = self.distribution.cdf(points[low])
        if high.any():
            cumulative[inside[high]] = -self.distribution.sf(points[high])
        return cumulative, above

    @cached_property
    def _median(self) -> float:
        return float(self.distribution.median())

    @cached_property
    @_calling_scipy
    def _table(self) -> tuple[Float[np.ndarray, "E"], Bool[np.ndarray, "E"]] | None:
        """`_cumulative` at every edge from `first` to `last` + 1, from the masses themselves; integer families only.

        SciPy sums some families' cdf anew at every call, and the sums of masses keep both tails' digits.
        """
        if not self.integer_only or self.num_values > _LARGEST_TABLE:
            return None
        masses = np.maximum(self.distribution.pmf(np.arange(self.first, self.last + 1)), 0)
        masses[0] += max(float(self.distribution.cdf(self.first - 1)), 0)
        masses[-1] += max(float(self.distribution.sf(self.last)), 0)
        masses /= masses.sum()
        below = np.concatenate([[0.0], np.cumsum(masses)])
        beyond = np.concatenate([np.cumsum(masses[::-1])[::-1], [0.0]])
        above = below > beyond
        return np.where(above, -beyond, below), above


@_calling_scipy
def analytic_space(spec: PromptSpec, *, num_decimals: int, quantile: float) -> AnalyticSpace:
    """The output space of a prompt at full resolution.

    Args:
      spec: only `family_id` and `parameters` matter.
      num_decimals: decimals of continuous values, at most 17.
      quantile: an unbounded support is cut at the quantiles `quantile` and 1 - `quantile`.

    Raises:
      UserError: bad parameters or settings, or numbers of more than 18 digits.
    """
    if not 0 <= num_decimals <= MAX_DECIMALS:
        raise UserError(f"num_decimals={num_decimals} must be from 0 to {MAX_DECIMALS} with data.space=full")
    if not 0 < quantile < 0.5:
        raise UserError(f"full_quantile={quantile} must be greater than 0 and less than 0.5")
    family = find_family(spec.family_id)
    distribution = family.frozen(spec.parameters)
    lower, upper = family.support(spec.parameters)
    # Quantiles go without their last digits, which depend on the CPU: they must not decide which strings exist.
    lower = lower if math.isfinite(lower) else float(f"{distribution.ppf(quantile):.12g}")
    upper = upper if math.isfinite(upper) else max(float(f"{distribution.isf(quantile):.12g}"), lower)
    decimals = 0 if family.integer_only else num_decimals
    limit = 2**53 if family.integer_only else LARGEST_INTEGER
    if not max(abs(lower), abs(upper)) * 10.0**decimals < limit:
        raise UserError(
            f"{spec.family_id} with {dict(spec.parameters)} reaches from {lower:.6g} to {upper:.6g}, too far for exact "
            f"arithmetic with num_decimals={decimals}; take fewer decimals or a larger config.data.full_quantile"
        )
    # Compared as decimals, as printed: 0.29 * 100 is below 29 in doubles, yet "0.29" is not above 0.29.
    first = math.ceil(Fraction(repr(lower)) * 10**decimals)
    last = math.floor(Fraction(repr(upper)) * 10**decimals)
    if first > last:
        first = last = round((Fraction(repr(lower)) + Fraction(repr(upper))) / 2 * 10**decimals)
    return AnalyticSpace(distribution, family.integer_only, decimals, first, last, lower, upper)
