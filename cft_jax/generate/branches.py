"""Samples that have drawn the same tokens, what becomes of them when they draw the next, and the rows they stand in.

Such samples are one branch, and a branch is one row of the decode: the forward pass is shared, and so is its softmax;
only the draws are the samples' own. A thousand numeric answers need some hundred rows this way; texts of which each
goes its own way become one row each by themselves. Every prompt has a slot with the same number of rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, UInt32

from cft_jax.generate.stops import StopStrings


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued: its index in the call, its token ids, and the key of its draws (`request_key`)."""

    index: int
    prompt: Sequence[int]
    key: UInt32[np.ndarray, "2"]


@dataclass(frozen=True)
class Completion:
    """A finished sample.

    Attributes:
      tokens: drawn, without the stop token.
      reason: "stop" (a stop token), "stop_string" or "length".
    """

    tokens: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Limits:
    """When a sample ends.

    Attributes:
      stop_ids: tokens that end it; not part of its text.
      stop_strings: texts that end it.
      max_new_tokens: its longest length.
    """

    stop_ids: frozenset[int]
    stop_strings: StopStrings
    max_new_tokens: int

    def end(self, tokens: list[int], token: int) -> Completion | None:
        """How a sample ends that draws `token` after `tokens`; None if it continues."""
        if token in self.stop_ids:
            return Completion(tuple(tokens), "stop")
        if self.stop_strings.strings and self.stop_strings.reached([*tokens, token]):
            return Completion((*tokens, token), "stop_string")
        if len(tokens) + 1 == self.max_new_tokens:
            return Completion((*tokens, token), "length")
        return None


@dataclass(eq=False)
class DecodeBranch:
    """Tokens that some samples of a request have drawn.

    Attributes:
      request: whose prompt it continues.
      tokens: the tokens.
      samples: numbers of the samples.
      fed: how many tokens its row has been fed: the prompt's last token, then its own.
      source: the row whose cache it continues; -1 where it begins from the prompt.
    """

    request: Request
    tokens: list[int]
    samples: Int[np.ndarray, "n"]
    fed: int
    source: int

    @property
    def draws(self) -> bool:
        """Whether the next step draws; else it feeds again what an earlier row was fed."""
        return self.fed == len(self.tokens)


def advance(
    branch: DecodeBranch, drawn: Int[np.ndarray, "n X"], limits: Limits
) -> tuple[list[DecodeBranch], list[tuple[Int[np.ndarray, "_"], Completion]]]:
    """What becomes of a branch whose samples have drawn: those that continue, and which samples finished, and how.

    There are several columns only for a single sample, whose branch is changed.
    """
    if branch.samples.size == 1:
        for token in drawn[0].tolist():
            end = limits.end(branch.tokens, token)
            if end is not None:
                return [], [(branch.samples, end)]
            branch.tokens.append(token)
        branch.fed = len(branch.tokens)
        return [branch], []
    continuing, finished = [], []
    different, which = np.unique(drawn[:, 0], return_inverse=True)
    for number, token in enumerate(different.tolist()):
        samples = branch.samples[which == number]
        end = limits.end(branch.tokens, token)
        if end is None:
            tokens = [*branch.tokens, token]
            continuing.append(DecodeBranch(branch.request, tokens, samples, len(tokens), branch.source))
        else:
            finished.append((samples, end))
    return continuing, finished


@dataclass(eq=False)
class Slot:
    """One prompt's share of the rows.

    Attributes:
      rows: the branch in each row, None where the row is free.
      branches: those that continue another row's cache and have no row yet.
      waiting: those that have no row and no cache.
    """

    rows: list[DecodeBranch | None]
    branches: list[DecodeBranch] = field(default_factory=list)
    waiting: list[DecodeBranch] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """Rows it could use; none while the slot is empty."""
        return sum(branch is not None for branch in self.rows) + len(self.branches) + len(self.waiting)

    def assign_rows(self, size: int) -> None:
        """Gives as many branches as there is room for a row among `size`; if the size stays, so do rows in use."""
        if size != len(self.rows):
            kept = [branch for branch in self.rows if branch is not None]
            self.rows = [*kept, *[None] * (size - len(kept))]
        free = [row for row, branch in enumerate(self.rows) if branch is None]
        entering = [*self.branches, *self.waiting]
        for row, branch in zip(free, entering, strict=False):
            self.rows[row] = branch
        for branch in self.branches[len(free) :]:
            # There is no room for it to continue its cache.
            branch.fed, branch.source = 0, -1
        self.branches, self.waiting = [], entering[len(free) :]


class Grid:
    """The slots and their rows; row r of slot p is row p * size + r of the device's arrays.

    A slot has as many rows as one of `sizes` (ascending) says; few sizes are compiled.
    """

    def __init__(self, slots: int, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes
        self.size = sizes[0]
        self.slots = [Slot([None] * self.size) for _ in range(slots)]

    def arrange(self) -> tuple[Int[np.ndarray, "C"], bool]:
        """Gives branches rows, in a larger or smaller grid where that fits them better.

        Returns:
          For each row the row whose cache it continues, -1 for none; and whether any cache must move for that.
        """
        wanted = min(max(slot.wanted for slot in self.slots), self._sizes[-1])
        size = next(size for size in self._sizes if size >= wanted)
        moves = size != self.size or any(slot.branches for slot in self.slots)
        for slot in self.slots:
            slot.assign_rows(size)
        self.size = size
        source = np.full(size * len(self.slots), -1, np.int32)
        for row, _, branch in self.branches():
            source[row] = branch.source
            branch.source = row
        return source, moves

    def branches(self) -> Iterator[tuple[int, Slot, DecodeBranch]]:
        """Every row in use, by ascending number, with its slot and branch."""
        for index, slot in enumerate(self.slots):
            for row, branch in enumerate(slot.rows):
                if branch is not None:
                    yield index * self.size + row, slot, branch
