"""Which prefix stands in which row: every prompt has a slot with the same number of rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from cft_jax.generate.prefixes import DecodeBranch, Request


@dataclass(eq=False)
class Slot:
    """One prompt's share of the rows.

    Attributes:
      request: whose prompt it is; None while the slot is empty.
      rows: the prefix in each row, None where the row is free.
      branches: prefixes that continue another row's cache and have no row yet.
      waiting: prefixes that have no row and no cache.
    """

    rows: list[DecodeBranch | None]
    request: Request | None = None
    branches: list[DecodeBranch] = field(default_factory=list)
    waiting: list[DecodeBranch] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """Rows it could use."""
        return sum(prefix is not None for prefix in self.rows) + len(self.branches) + len(self.waiting)

    def place(self, size: int) -> None:
        """Gives as many prefixes as there is room for a row among `size`; a row keeps its place if the size does."""
        if size != len(self.rows):
            kept = [prefix for prefix in self.rows if prefix is not None]
            self.rows = [*kept, *[None] * (size - len(kept))]
        free = [row for row, prefix in enumerate(self.rows) if prefix is None]
        entering = [*self.branches, *self.waiting]
        for row, prefix in zip(free, entering, strict=False):
            self.rows[row] = prefix
        for prefix in self.branches[len(free) :]:
            prefix.begin_again()
        self.branches, self.waiting = [], entering[len(free) :]


class Grid:
    """The slots and their rows; row r of slot p is row p * size + r of the device's arrays.

    Args:
      slots: how many prompts there is room for.
      sizes: rows per slot to choose from, ascending; few sizes are compiled.
    """

    def __init__(self, slots: int, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes
        self.size = sizes[0]
        self.slots = [Slot([None] * self.size) for _ in range(slots)]

    def arrange(self) -> tuple[Int[np.ndarray, "C"], bool]:
        """Gives prefixes rows, in a larger or smaller grid where that fits them better.

        Returns:
          For each row the row whose cache it continues, -1 for none; and whether any cache must move for that.
        """
        wanted = min(max(slot.wanted for slot in self.slots), self._sizes[-1])
        size = next(size for size in self._sizes if size >= wanted)
        moves = size != self.size or any(slot.branches for slot in self.slots)
        for slot in self.slots:
            slot.place(size)
        self.size = size
        source = np.full(size * len(self.slots), -1, np.int32)
        for row, _, prefix in self.prefixes():
            source[row] = prefix.source
            prefix.source = row
        return source, moves

    def prefixes(self) -> Iterator[tuple[int, Slot, DecodeBranch]]:
        """Every row in use, by ascending number, with its slot and prefix."""
        for place, slot in enumerate(self.slots):
            for row, prefix in enumerate(slot.rows):
                if prefix is not None:
                    yield place * self.size + row, slot, prefix
