"""Output spaces: the strings that answer a prompt and their probabilities.

The paper's discretisation (arXiv 2605.11845): a continuous family is cut at two quantiles and covered by at most
`max_bins` decimal numbers, each standing for its bin; an integer family lists its integers from below. Nothing larger
than the kept numbers is ever made, however wide the range.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import find_family
from cft_jax.distributions.splits import PromptSpec

SUM_TOLERANCE = 1e-6
TAIL_POLICIES = ("clip_to_edge_bin", "drop", "none")
# Above 2**50 the double k * 10**-d no longer prints as the integer k with its decimal point moved d places.
_LARGEST_INTEGER = 2.0**50
# More than the CPU, the system's library or SciPy's version change in a quantile or a cdf, relative to it.
_ROUNDING = 2.0**-40


@dataclass(frozen=True, eq=False)
class OutputSpace:
    """Listed strings and their probabilities, in a fixed order; strings of zero probability stay in.

    Attributes:
      values: the strings, all different; any text.
      probabilities: float64[N]; on construction checked and divided by its sum, then read-only.
      lower_bound, upper_bound: the range of a number's space before rounding to decimals; NaN for other strings.
      lost_mass: how much of a family's probability none of the values stands for; 0 for other strings.

    Raises:
      UserError: on construction, no values, repeated values, another number of probabilities than of values,
        a probability that is negative or not finite, or a sum further than 1e-6 from 1.
    """

    values: tuple[str, ...]
    probabilities: Float[np.ndarray, "N"]
    lower_bound: float = math.nan
    upper_bound: float = math.nan
    lost_mass: float = 0.0

    def __post_init__(self):
        values = tuple(self.values)
        probabilities = np.array(self.probabilities, dtype=np.float64)
        if not values:
            raise UserError("an output space needs at least one value")
        if probabilities.shape != (len(values),):
            raise UserError(
                f"{len(values)} values need as many probabilities, not an array of shape {probabilities.shape}"
            )
        if len(set(values)) < len(values):
            repeated = Counter(values).most_common(1)[0][0]
            raise UserError(f"value {repeated!r} occurs more than once; add its probabilities up")
        bad = ~(np.isfinite(probabilities) & (probabilities >= 0))
        if bad.any():
            first = int(np.argmax(bad))
            raise UserError(f"probability {probabilities[first]} of {values[first]!r} must be finite and not negative")
        total = float(probabilities.sum())
        if abs(total - 1) > SUM_TOLERANCE:
            raise UserError(f"probabilities sum to {total:.9g}; they must sum to 1 within {SUM_TOLERANCE:g}")
        # A correctly rounded sum: what is listed stays a function of what was given alone.
        probabilities /= math.fsum(probabilities.tolist())
        probabilities.flags.writeable = False
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "probabilities", probabilities)


@dataclass(frozen=True, eq=False)
class NumberSpace:
    """The output space of a family, its strings not yet written: item i is the integer k_i times 10**-num_decimals.

    The k_i are `probabilities.size` of the `range_size` consecutive integers from `first`, evenly thinned. A stream
    that draws few of many values keeps this record and writes only the strings it draws.

    Attributes:
      first: the smallest k, an integer; -0.0 for the string "-0.00" that the paper's rounding makes.
      range_size: how many integers the range holds.
      num_decimals: decimals of the strings; 0 for integer families.
      probabilities: float64[N], read-only, sums to 1.
      lower_bound, upper_bound: the range before rounding to decimals.
      lost_mass: how much of the family's probability none of the values stands for: dropped tails, and the integers
        past `max_bins`, also where their probability went to the last value. It is large where the paper's cut does
        not fit, as for binomial(2500, 0.6) in 1001 bins.
    """

    first: float
    range_size: float
    num_decimals: int
    probabilities: Float[np.ndarray, "N"]
    lower_bound: float
    upper_bound: float
    lost_mass: float

    def integers(self, indices: Int[np.ndarray, "M"] | None = None) -> Float[np.ndarray, "M"]:
        """The integers k of these items (all when None), as exact doubles."""
        count = self.probabilities.size
        return thinned_integers(self.first, self.range_size, count, np.arange(count) if indices is None else indices)

    def strings(self, indices: Int[np.ndarray, "M"] | None = None) -> list[str]:
        """The strings of these items (all when None)."""
        return decimal_strings(self.integers(indices), self.num_decimals)

    def listed(self) -> OutputSpace:
        """The space with all its strings written."""
        return OutputSpace(
            tuple(self.strings()), self.probabilities, self.lower_bound, self.upper_bound, self.lost_mass
        )


def output_space(
    spec: PromptSpec,
    *,
    num_decimals: int,
    max_bins: int,
    quantile_low: float = 0.001,
    quantile_high: float = 0.999,
    tail_policy: str = "clip_to_edge_bin",
) -> OutputSpace:
    """The paper's output space of a prompt; see `number_space` for the arguments and errors."""
    return number_space(
        spec,
        num_decimals=num_decimals,
        max_bins=max_bins,
        quantile_low=quantile_low,
        quantile_high=quantile_high,
        tail_policy=tail_policy,
    ).listed()


def number_space(
    spec: PromptSpec,
    *,
    num_decimals: int,
    max_bins: int,
    quantile_low: float = 0.001,
    quantile_high: float = 0.999,
    tail_policy: str = "clip_to_edge_bin",
) -> NumberSpace:
    """The paper's output space of a prompt, without writing its strings.

    Args:
      spec: only `family_id` and `parameters` matter.
      num_decimals: decimals of continuous values.
      max_bins: largest number of values.
      quantile_low: where a continuous family, or an integer family unbounded below, is cut.
      quantile_high: where a continuous family, or an integer family unbounded above, is cut.
      tail_policy: one of `TAIL_POLICIES`: `clip_to_edge_bin` gives what lies beyond the cuts to the first and last
        value (integers: beyond the last to the last); `drop`, in the paper's code `none`, leaves it out.

    Raises:
      UserError: bad parameters or settings, a range too wide for doubles, or kept integers without any probability.
    """
    family = find_family(spec.family_id)
    return frozen_space(
        family.frozen(spec.parameters),
        named=f"{spec.family_id} with {dict(spec.parameters)}",
        support=family.support(spec.parameters),
        exact_quantiles=family.exact_quantiles,
        num_decimals=num_decimals,
        max_bins=max_bins,
        quantile_low=quantile_low,
        quantile_high=quantile_high,
        tail_policy=tail_policy,
    )


def frozen_space(
    distribution: Any,
    *,
    num_decimals: int,
    max_bins: int,
    quantile_low: float = 0.001,
    quantile_high: float = 0.999,
    tail_policy: str = "clip_to_edge_bin",
    named: str = "",
    support: tuple[float, float] | None = None,
    exact_quantiles: bool = False,
) -> NumberSpace:
    """The paper's output space of a frozen distribution of `scipy.stats`, such as `scipy.stats.norm(0, 1)`.

    The distribution is of one variable, of integers where it is discrete; `named` is its name in errors, `support` its
    smallest and largest value (both SciPy's by default), `exact_quantiles` as in `Family`, and the settings are those
    of `number_space`.

    Raises:
      UserError: it is no frozen distribution of one variable; or see `number_space`.
    """
    kind = getattr(distribution, "dist", None)
    is_known = isinstance(kind, stats.rv_continuous | stats.rv_discrete)
    if not is_known or any(map(np.ndim, (*distribution.args, *distribution.kwds.values()))):
        raise UserError(f"{distribution!r} must be a frozen distribution of one variable, as scipy.stats.norm(0, 1)")
    named, integer_only = named or kind.name, isinstance(kind, stats.rv_discrete)
    if not 0 < quantile_low < quantile_high < 1:
        raise UserError(
            f"quantile_low={quantile_low} and quantile_high={quantile_high} must satisfy 0 < low < high < 1"
        )
    if max_bins < 2 or num_decimals < 0:
        raise UserError(f"max_bins={max_bins} must be at least 2 and num_decimals={num_decimals} at least 0")
    if tail_policy not in TAIL_POLICIES:
        raise UserError(f"tail_policy={tail_policy!r} must be one of {', '.join(TAIL_POLICIES)}")
    least, most = distribution.support() if support is None else support
    clip = tail_policy == "clip_to_edge_bin"
    # SciPy meets infinities on its way to finite results, and to quantiles that are refused here.
    with np.errstate(over="ignore", divide="ignore"):
        # The smallest integer whose cdf reaches a quantile, also where the two are equal but for rounding.
        nearly = 1 - _ROUNDING * integer_only
        lower, upper = (float(cut) for cut in distribution.ppf([quantile_low * nearly, quantile_high * nearly]))
        if not (math.isfinite(lower) and math.isfinite(upper) and lower <= upper):
            raise UserError(
                f"{named}: the quantiles at {quantile_low} and {quantile_high} are {lower} and {upper}, outside the "
                "range of doubles; take milder parameters or quantiles"
            )
        if integer_only:
            start = math.floor(least if math.isfinite(least) else lower)
            stop = math.ceil(most if math.isfinite(most) else upper)
            clip = clip and math.isinf(most)
            masses, moved = _integer_masses(named, distribution, start, stop, max_bins, clip)
            first, size, decimals = float(start), float(masses.size), 0
            bounds = first, first + size - 1
        else:
            bounds = max(lower, least), min(upper, most)
            first, size, masses = _decimal_masses(
                named, distribution, bounds, num_decimals, exact_quantiles, max_bins, clip
            )
            decimals, moved = num_decimals, 0.0
    total = float(masses.sum())
    probabilities = masses / total
    probabilities.flags.writeable = False
    return NumberSpace(first, size, decimals, probabilities, *bounds, max(0.0, 1 - total) + moved)


def decimal_strings(integers: Real[np.ndarray, "N"], num_decimals: int) -> list[str]:
    """Writes k·10**-num_decimals for every k with exactly `num_decimals` decimals; -0.0 keeps its sign.

    Exact for doubles and for int64; equals `f"{k * 10.0**-d:.{d}f}"` for |k| < 2**50, in a third of the time: all
    digits of all numbers are computed at once in a byte matrix, whose unused leading places are then left out.
    """
    if integers.size == 0:
        return []
    rest = np.abs(integers).astype(np.int64)
    num_digits = max(len(str(int(rest.max()))), num_decimals + 1)
    point = int(num_decimals > 0)
    # Columns: sign, digits of the whole part, point, decimals, newline.
    text = np.empty((integers.size, num_digits + point + 2), dtype=np.uint8)
    for place in range(num_digits):
        rest, digit = np.divmod(rest, 10)
        text[:, -2 - place - (point if place >= num_decimals else 0)] = digit + ord("0")
    if point:
        text[:, -2 - num_decimals] = ord(".")
    text[:, -1] = ord("\n")
    text[:, 0] = ord("-")
    keep = np.ones(text.shape, dtype=bool)
    keep[:, 0] = np.signbit(integers)
    num_whole = num_digits - num_decimals
    keep[:, 1:num_whole] = np.cumsum(text[:, 1:num_whole] != ord("0"), axis=1) > 0
    return text[keep].tobytes().decode("ascii").split("\n")[:-1]


def _decimal_masses(
    named: str, distribution: Any, bounds: tuple[float, float], decimals: int, exact: bool, max_bins: int, clip: bool
) -> tuple[float, float, np.ndarray]:
    """The first integer, how many the range holds, and the masses of those kept."""
    lower, upper = bounds
    step = float(f"1e-{decimals}")
    first, last = inner_integers(lower / step, upper / step, rounding=0.0 if exact else _ROUNDING)
    if max(abs(first), abs(last)) >= _LARGEST_INTEGER:
        raise UserError(
            f"{named} reaches from {lower:.6g} to {upper:.6g}, too far for doubles with num_decimals={decimals}; "
            "take fewer decimals or narrower quantiles"
        )
    if last < first:
        # No number of these decimals lies between the bounds: the one nearest their middle stands for everything.
        only = round(float(f"{(lower + upper) / 2:.12g}"), decimals)
        return float(np.round(only / step)), 1.0, np.ones(1)
    size = last - first + 1
    count = int(min(size, max_bins))
    numbers = thinned_integers(first, size, count, np.arange(count)) * step
    cdf = distribution.cdf(np.concatenate([[lower], (numbers[:-1] + numbers[1:]) / 2, [upper]]))
    masses = np.diff(cdf)
    if clip:
        masses[0] += cdf[0]
        masses[-1] += 1 - cdf[-1]
    return first, size, np.clip(masses, 0, None)


def inner_integers(lower: float, upper: float, *, rounding: float) -> tuple[float, float]:
    """The first and the last integer between two cuts, the same on every machine.

    Which strings exist must not depend on the last digits of a quantile, so that an integer within `rounding`,
    relative, of a cut lies outside. The Pareto distribution's quantile at 0.999 with alpha = 3 is such a cut: 10 xm.
    """
    lower, upper = lower + rounding * max(1.0, abs(lower)), upper - rounding * max(1.0, abs(upper))
    return float(np.ceil(lower)), float(np.floor(upper))


def _integer_masses(
    named: str, distribution: Any, first: int, wanted: int, max_bins: int, clip: bool
) -> tuple[np.ndarray, float]:
    """The masses from the first integer on, and how much of the last one's stands for those past `max_bins`."""
    # The paper keeps the first max_bins integers and drops the rest of a bounded support. A quantile may lie below the
    # support: SciPy's of geometric(p=1) is 0.
    last = min(max(first, wanted), first + max_bins - 1)
    masses = np.clip(distribution.pmf(np.arange(first, last + 1, dtype=np.float64)), 0, None)
    moved = 0.0
    if clip:
        beyond = 1 - distribution.cdf(last)
        masses[-1] += beyond
        moved = float(beyond) if last < wanted else 0.0
    if not masses.sum() > 0:
        raise UserError(
            f"{named}: the integers {first} to {last} have no probability; max_bins={max_bins} must be larger"
        )
    return masses, moved


def thinned_integers(
    first: float | Float[np.ndarray, "#M"],
    size: float | Float[np.ndarray, "#M"],
    count: int | Int[np.ndarray, "#M"],
    indices: Int[np.ndarray, "M"],
) -> Float[np.ndarray, "M"]:
    """Items `indices` of first + trunc(linspace(0, size - 1, count)), computed as numpy.linspace does, bit by bit.

    The first three may differ from item to item.
    """
    offsets = np.floor(indices * ((np.asarray(size) - 1) / np.maximum(np.asarray(count) - 1, 1)))
    last = indices == np.asarray(count) - 1
    # A sum with 0 would turn the -0.0 of a single item into 0.0.
    return np.where(last & (np.asarray(count) == 1), first, first + np.where(last, np.asarray(size) - 1, offsets))
