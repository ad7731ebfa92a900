"""The distribution a sample is measured against: one of the families, or listed numbers with probabilities."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cft_jax.distributions.families import Family, find_family

# Quantiles and draws of integer targets are read from a table of their CDF between these far quantiles (a draw beyond
# has probability 2e-12) where the table is not too long; scipy's own take seconds for some families, and for a Skellam
# distribution some never end.
_TABLE_TAIL = 1e-12
_MAX_TABLE = 10**6


@dataclass(frozen=True, eq=False)
class FamilyTarget:
    """A family with parameters, as asked for in the prompt; `num_decimals` is the resolution of written values.

    Mean and variance are not finite where they do not exist.
    """

    family_id: str
    parameters: Mapping[str, float]
    num_decimals: int

    @property
    def family(self) -> Family:
        return find_family(self.family_id)

    @functools.cached_property
    def frozen(self) -> Any:
        return self.family.frozen(self.parameters)

    @functools.cached_property
    def mean(self) -> float:
        return float(self.frozen.stats(moments="m"))

    @functools.cached_property
    def variance(self) -> float:
        return float(self.frozen.stats(moments="v"))

    @functools.cached_property
    def interquartile_range(self) -> float:
        return float(np.ptp(self._at(np.array([0.25, 0.75]))))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a target lives as long as its prompt is measured
    def quantiles(self, count: int) -> Float[np.ndarray, "N"]:
        """The quantiles at (i - 0.5)/count, i from 1."""
        return self._at((np.arange(1, count + 1) - 0.5) / count)

    def cdf_around(self, values: Float[np.ndarray, "N"]) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
        """P(below) and P(up to) each value, of what a draw is when written: an integer, or rounded to the decimals."""
        if self.family.integer_only:
            return self.frozen.cdf(np.ceil(values) - 1), self.frozen.cdf(np.floor(values))
        half = 0.5 * 10.0**-self.num_decimals
        return self.frozen.cdf(values - half), self.frozen.cdf(values + half)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Independent draws, not rounded."""
        if not self.family.integer_only:
            return np.asarray(self.frozen.rvs(size=shape, random_state=rng), np.float64)
        return self._at(rng.random(shape))

    def _at(self, levels: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        if self._cumulative is None:
            return np.asarray(self.frozen.ppf(levels), np.float64)
        lowest, cumulative = self._cumulative
        return lowest + np.searchsorted(cumulative, levels, side="left").astype(np.float64)

    @functools.cached_property
    def _cumulative(self) -> tuple[float, Float[np.ndarray, "N"]] | None:
        """The lowest integer of the table, and the CDF from there on; None without a table."""
        if not self.family.integer_only:
            return None
        lowest, highest = map(float, self.frozen.ppf([_TABLE_TAIL, 1 - _TABLE_TAIL]))
        return None if highest - lowest > _MAX_TABLE else (lowest, self.frozen.cdf(np.arange(lowest, highest)))


@dataclass(frozen=True, eq=False)
class ListedTarget:
    """Listed numbers in ascending order, all different, with probabilities that sum to 1."""

    values: Float[np.ndarray, "N"]
    probabilities: Float[np.ndarray, "N"]

    @staticmethod
    def of(values: Sequence[float] | Float[np.ndarray, "N"], probabilities: Float[np.ndarray, "N"]) -> "ListedTarget":
        """From numbers in any order; the probabilities of equal ones are added."""
        numbers, inverse = np.unique(np.asarray(values, np.float64), return_inverse=True)
        return ListedTarget(numbers, np.bincount(inverse.ravel(), weights=probabilities))

    @functools.cached_property
    def cumulative(self) -> Float[np.ndarray, "N"]:
        cumulative = np.cumsum(self.probabilities)
        return np.minimum(cumulative / cumulative[-1], 1.0)

    @functools.cached_property
    def mean(self) -> float:
        return float(self.values @ self.probabilities)

    @functools.cached_property
    def variance(self) -> float:
        return float((self.values - self.mean) ** 2 @ self.probabilities)

    @functools.cached_property
    def interquartile_range(self) -> float:
        return float(np.ptp(self._at(np.array([0.25, 0.75]))))

    def quantiles(self, count: int) -> Float[np.ndarray, "N"]:
        """The quantiles at (i - 0.5)/count, i from 1."""
        return self._at((np.arange(1, count + 1) - 0.5) / count)

    def cdf_around(self, values: Float[np.ndarray, "N"]) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
        """P(below) and P(up to) each value."""
        padded = np.concatenate([[0.0], self.cumulative])
        below, at = (np.searchsorted(self.values, values, side=side) for side in ("left", "right"))
        return padded[below], padded[at]

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Independent draws."""
        return self._at(rng.random(shape))

    def _at(self, levels: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        index = np.searchsorted(self.cumulative, levels, side="left")
        return self.values[np.minimum(index, self.values.size - 1)]


Target = FamilyTarget | ListedTarget
