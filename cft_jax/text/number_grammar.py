"""Prefixes of numbers, many at a time: the tokens that may follow each, and the integers below each child.

A string is an optional "-", a whole part without leading zeros, and for d > 0 a point and exactly d decimals; it
stands for an integer k, its digits read without the point. The strings that share a prefix and the number of digits
L of the whole part are an interval of |k|, and the next group of w digits cuts it into up to 10**w steps of equal
width. Such a series of steps is a *ladder*; a prefix inside the whole part has one ladder for every L that is still
possible, any other prefix has one. A group shorter than the tokenizer's largest ends the run of digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cft_jax.common.errors import UserError
from cft_jax.distributions.analytic_space import AnalyticSpace
from cft_jax.text.digits import POWERS, DigitTokens, digit_counts


@dataclass(frozen=True, eq=False)
class NumberTokens:
    """The tokens of numbers in one row of slots: groups of one digit, of two, of three, then "-", ".", the terminator.

    Attributes:
      numbers: the tokenizer's digits.
      terminator_id: closes every string.

    Raises:
      UserError: on construction, the terminator is one of the tokens of numbers.
    """

    numbers: DigitTokens
    terminator_id: int

    def __post_init__(self):
        if self.terminator_id in self.ids[:-1]:
            raise UserError(
                f"the terminator, token {self.terminator_id}, occurs in numbers; set config.data.terminator"
            )

    @cached_property
    def ids(self) -> Int[np.ndarray, "S"]:
        """int32: the token of every slot."""
        signs = [self.numbers.minus, self.numbers.point, self.terminator_id]
        return np.concatenate([*self.numbers.runs, signs]).astype(np.int32)

    @cached_property
    def widths(self) -> Int[np.ndarray, "S"]:
        """Digits of every slot's token; 0 for those that hold none."""
        runs = [np.full(run.size, w) for w, run in enumerate(self.numbers.runs, 1)]
        return np.concatenate([*runs, [0, 0, 0]])

    @cached_property
    def values(self) -> Int[np.ndarray, "S"]:
        """The value of every slot's digits."""
        return np.concatenate([*(np.arange(run.size) for run in self.numbers.runs), [0, 0, 0]])

    @cached_property
    def by_id(self) -> Int[np.ndarray, "S"]:
        """The slots in the order of their token ids."""
        return np.argsort(self.ids)

    @cached_property
    def ranks(self) -> Int[np.ndarray, "S"]:
        """The rank of every slot in the order of token ids."""
        return np.argsort(self.by_id)

    @property
    def minus(self) -> int:
        """The slot of "-"; "." and the terminator have the next two."""
        return self.ids.size - 3

    @property
    def point(self) -> int:
        """The slot of "."."""
        return self.ids.size - 2

    @property
    def terminator(self) -> int:
        """The slot of the terminator."""
        return self.ids.size - 1

    def slots(self, tokens: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """The slots of these tokens.

        Raises:
          ValueError: a token is none of a number.
        """
        ordered = self.ids[self.by_id]
        rank = np.minimum(np.searchsorted(ordered, tokens), ordered.size - 1)
        if (ordered[rank] != tokens).any():
            raise ValueError(f"tokens {tokens[ordered[rank] != tokens].tolist()} are no part of a number")
        return self.by_id[rank]


class NumberState(NamedTuple):
    """What has been read of N numbers: their prefixes.

    Attributes:
      owner: int64[N], which space a prefix belongs to.
      negative: whether it begins with "-".
      digits: digits of the whole part read so far.
      decimals: digits read after the point; -1 before the point.
      value: the integer that all digits read make, the point left out.
    """

    owner: Int[np.ndarray, "N"]
    negative: Bool[np.ndarray, "N"]
    digits: Int[np.ndarray, "N"]
    decimals: Int[np.ndarray, "N"]
    value: Int[np.ndarray, "N"]

    @classmethod
    def empty(cls, owner: Int[np.ndarray, "N"]) -> "NumberState":
        """The empty prefix of each of these spaces."""
        zeros = np.zeros(owner.size, dtype=np.int64)
        return cls(owner, zeros.astype(bool), zeros, zeros - 1, zeros)

    def take(self, indices: Int[np.ndarray, "M"]) -> "NumberState":
        """The prefixes at these indices."""
        return NumberState(*(field[indices] for field in self))

    def extended(self, slots: Int[np.ndarray, "N"], tokens: NumberTokens) -> "NumberState":
        """Every prefix with one more token, which must be able to follow and not be the terminator."""
        width = tokens.widths[slots]
        whole = self.decimals < 0
        return NumberState(
            self.owner,
            self.negative | (slots == tokens.minus),
            self.digits + np.where(whole, width, 0),
            np.where(slots == tokens.point, 0, self.decimals + np.where(whole, 0, width)),
            self.value * POWERS[width] + tokens.values[slots],
        )


class Children(NamedTuple):
    """What may follow each of N prefixes, ordered by prefix and token id.

    Attributes:
      prefix: int64[K], which of the prefixes.
      slot: int64[K], the child's token as a slot of `NumberTokens`.
      mass: float64[K], probability of the strings below the child.
      weight: float64[K], the sum over those strings of probability / number of tokens, the terminator included.
    """

    prefix: Int[np.ndarray, "K"]
    slot: Int[np.ndarray, "K"]
    mass: Float[np.ndarray, "K"]
    weight: Float[np.ndarray, "K"]


class _Ladders(NamedTuple):
    """Steps start + j·step ≤ |k| < start + (j + 1)·step for 0 ≤ j < num_steps; step j is below the child slot + j.

    `whole_digits` is the number of digits that the whole part has in all of them.
    """

    prefix: np.ndarray
    negative: np.ndarray
    whole_digits: np.ndarray
    start: np.ndarray
    step: np.ndarray
    num_steps: np.ndarray
    slot: np.ndarray


class NumberGrammar:
    """The strings of several spaces in one tokenizer's tokens."""

    def __init__(self, tokens: NumberTokens, spaces: Sequence[AnalyticSpace]):
        self.tokens = tokens
        self.spaces = tuple(spaces)
        self._group = tokens.numbers.group
        self._decimals = np.array([space.num_decimals for space in spaces], dtype=np.int64)
        self._first = np.array([space.first for space in spaces], dtype=np.int64)
        self._last = np.array([space.last for space in spaces], dtype=np.int64)

    def children(self, prefixes: NumberState) -> Children:
        """Every child of every prefix, also those without probability; prefixes in ascending order of owner."""
        ladders = self._ladders(prefixes)
        ladder, step, masses = self._masses(ladders, prefixes.owner[ladders.prefix])
        num_slots = self.tokens.ids.size
        num_cells = prefixes.owner.size * num_slots
        cell = ladders.prefix[ladder] * num_slots + self.tokens.ranks[ladders.slot[ladder] + step]
        cells = np.flatnonzero(np.bincount(cell, minlength=num_cells))
        weights = masses / self._num_positions(ladders, prefixes.owner[ladders.prefix])[ladder]
        return Children(
            cells // num_slots,
            self.tokens.by_id[cells % num_slots],
            np.bincount(cell, weights=masses, minlength=num_cells)[cells],
            np.bincount(cell, weights=weights, minlength=num_cells)[cells],
        )

    def intervals(
        self, prefixes: NumberState
    ) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
        """The strings below the prefixes as intervals: (prefix, start, stop) for start ≤ k < stop, by prefix."""
        ladders = self._ladders(prefixes)
        owner = prefixes.owner[ladders.prefix]
        near = self._edges(ladders.negative, ladders.start, owner)
        far = self._edges(ladders.negative, ladders.start + ladders.num_steps * ladders.step, owner)
        return ladders.prefix, np.minimum(near, far), np.maximum(near, far)

    def _num_positions(self, ladders: _Ladders, owner: np.ndarray) -> np.ndarray:
        """Tokens of the strings on each ladder, sign and terminator included."""
        decimals = self._decimals[owner]
        after = np.where(decimals > 0, 1 - (-decimals // self._group), 0)
        return ladders.negative - (-ladders.whole_digits // self._group) + after + 1

    def _edges(self, negative: np.ndarray, size: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """The edge between |k| < size and |k| ≥ size as an edge between integers k, moved into the space."""
        first, last = self._first[owner], self._last[owner]
        edge = np.where(negative, 1 - size, size)
        # Below "-" lie only k < 0, without it only k ≥ 0.
        least, end = (
            np.where(negative, first, np.maximum(first, 0)),
            np.where(negative, np.minimum(last + 1, 0), last + 1),
        )
        return np.clip(edge, least, end)

    def _masses(self, ladders: _Ladders, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every step as (ladder, index of the step, probability); edges shared by two steps are evaluated once."""
        num_edges = ladders.num_steps + 1
        edge_starts = np.concatenate([[0], num_edges.cumsum()])
        of_edge = np.repeat(np.arange(num_edges.size), num_edges)
        index = np.arange(of_edge.size) - edge_starts[of_edge]
        size = ladders.start[of_edge] + index * ladders.step[of_edge]
        edges = self._edges(ladders.negative[of_edge], size, owner[of_edge])
        near = np.flatnonzero(index < ladders.num_steps[of_edge])
        ladder = of_edge[near]
        descending = ladders.negative[ladder]
        lower, upper = near + descending, near + 1 - descending
        masses = np.empty(near.size)
        present, ladder_starts = np.unique(owner, return_index=True)
        bounds = np.append(ladder_starts, owner.size)
        for space, begin, end in zip(present, bounds[:-1], bounds[1:], strict=True):
            edge_slice = slice(edge_starts[begin], edge_starts[end])
            # One step fewer than edges on every ladder.
            steps = slice(edge_starts[begin] - begin, edge_starts[end] - end)
            offset = edge_slice.start
            masses[steps] = self.spaces[space].masses(edges[edge_slice], lower[steps] - offset, upper[steps] - offset)
        return ladder, index[near], masses

    def _ladders(self, prefixes: NumberState) -> _Ladders:
        """The ladders of every prefix, in order of the prefixes, cut to the steps that hold any string."""
        before_point = prefixes.decimals < 0
        decimals = self._decimals[prefixes.owner]
        open_whole = (prefixes.digits % self._group == 0) & (prefixes.value > 0)
        growing = np.flatnonzero(before_point & (open_whole | (prefixes.digits == 0)))
        closing = np.flatnonzero(before_point & (prefixes.digits > 0))
        reading = np.flatnonzero(~before_point & (prefixes.decimals < decimals))
        complete = np.flatnonzero(~before_point & (prefixes.decimals == decimals))
        unsigned = np.flatnonzero(before_point & (prefixes.digits == 0) & ~prefixes.negative)
        parts = [
            self._sign(prefixes, unsigned),
            self._whole_part(prefixes, growing),
            self._single(prefixes, closing, np.where(decimals > 0, self.tokens.point, self.tokens.terminator)),
            self._decimal_part(prefixes, reading),
            self._single(prefixes, complete, np.full(decimals.size, self.tokens.terminator)),
        ]
        ladders = _Ladders(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        return self._cut(ladders, prefixes.owner[ladders.prefix])

    def _cut(self, ladders: _Ladders, owner: np.ndarray) -> _Ladders:
        """The ladders without the steps that hold no string of their space, in order of the prefixes."""
        smallest, largest = self._sizes(ladders.negative, owner)
        skipped = np.maximum((smallest - ladders.start) // ladders.step, 0)
        stop = np.minimum((largest - ladders.start) // ladders.step + 1, ladders.num_steps)
        cut = ladders._replace(
            start=ladders.start + skipped * ladders.step, num_steps=stop - skipped, slot=ladders.slot + skipped
        )
        kept = np.flatnonzero(stop > skipped)
        kept = kept[np.argsort(ladders.prefix[kept], kind="stable")]
        return _Ladders(*(column[kept] for column in cut))

    def _sizes(self, negative: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest |k| of this sign in each space; the largest is -1 where there is none."""
        first, last = self._first[owner], self._last[owner]
        smallest = np.where(negative, np.maximum(-last, 1), np.maximum(first, 0))
        largest = np.where(negative, -first, last)
        return smallest, np.where(largest < smallest, -1, largest)

    def _lengths(
        self, prefixes: NumberState, indices: np.ndarray, negative: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every prefix with every number of digits that the whole part may still reach: (index, digits)."""
        owner = prefixes.owner[indices]
        _, largest = self._sizes(negative, owner)
        most = np.where(largest < 0, 0, digit_counts(np.maximum(largest, 0) // POWERS[self._decimals[owner]]))
        num_lengths = np.maximum(most - prefixes.digits[indices], 0)
        starts = num_lengths.cumsum() - num_lengths
        within = np.arange(num_lengths.sum()) - np.repeat(starts, num_lengths)
        repeated = np.repeat(indices, num_lengths)
        return repeated, prefixes.digits[repeated] + 1 + within

    def _sign(self, prefixes: NumberState, indices: np.ndarray) -> _Ladders:
        """From the empty prefix to "-": a single step for every number of digits."""
        index, digits = self._lengths(prefixes, indices, np.ones(indices.size, dtype=bool))
        scale = POWERS[self._decimals[prefixes.owner[index]]]
        start = np.where(digits > 1, POWERS[digits - 1], 0) * scale
        one = np.ones_like(index)
        slot = np.full_like(index, self.tokens.minus)
        return _Ladders(index, one.astype(bool), digits, start, POWERS[digits] * scale - start, one, slot)

    def _whole_part(self, prefixes: NumberState, indices: np.ndarray) -> _Ladders:
        """From a whole part that may continue to the next group of its digits."""
        index, digits = self._lengths(prefixes, indices, prefixes.negative[indices])
        left = digits - prefixes.digits[index]
        width = np.minimum(left, self._group)
        # Only "0" begins with a zero.
        least = np.where((prefixes.digits[index] == 0) & (digits > 1), POWERS[width - 1], 0)
        step = POWERS[left - width] * POWERS[self._decimals[prefixes.owner[index]]]
        start = (prefixes.value[index] * POWERS[width] + least) * step
        slot = (POWERS[width] - 10) // 9 + least
        return _Ladders(index, prefixes.negative[index], digits, start, step, POWERS[width] - least, slot)

    def _decimal_part(self, prefixes: NumberState, index: np.ndarray) -> _Ladders:
        """From the point, or from decimals that are not complete, to the next group."""
        left = self._decimals[prefixes.owner[index]] - prefixes.decimals[index]
        width = np.minimum(left, self._group)
        start, step = prefixes.value[index] * POWERS[left], POWERS[left - width]
        slot = (POWERS[width] - 10) // 9
        return _Ladders(index, prefixes.negative[index], prefixes.digits[index], start, step, POWERS[width], slot)

    def _single(self, prefixes: NumberState, index: np.ndarray, slots: np.ndarray) -> _Ladders:
        """From a whole part that ends here, or from a whole string, to the one token that says so."""
        left = self._decimals[prefixes.owner[index]] - np.maximum(prefixes.decimals[index], 0)
        start, step = prefixes.value[index] * POWERS[left], POWERS[left]
        one = np.ones_like(index)
        return _Ladders(index, prefixes.negative[index], prefixes.digits[index], start, step, one, slots[index])
