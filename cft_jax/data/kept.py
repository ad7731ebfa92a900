"""Texts to keep what a model does with: packed once into rows, of which each step takes some."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from cft_jax.text.tree_rows import first_fit

_ORDER = 0x6B657074


class KeptBatch(NamedTuple):
    """B rows of T tokens of whole texts, one behind the other; NumPy here, the same arrays on devices.

    Attributes:
      tokens: token ids; 0 where padded.
      positions: in the text.
      subtree_end: one past the last token of the text; 0 where padded.
      next_tokens: the token that follows in the text; 0 where none does.
      weight: 1 where one follows, else 0.
      base_hidden: hidden states of the base, where the model cannot give them; else None.
    """

    tokens: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    subtree_end: Int32[np.ndarray, "B T"]
    next_tokens: Int32[np.ndarray, "B T"]
    weight: Float32[np.ndarray, "B T"]
    base_hidden: Float[np.ndarray, "B T D"] | None = None


@dataclass(frozen=True, eq=False)
class KeptTexts:
    """Rows of texts, and which of them a step sees.

    Attributes:
      rows: all of them.
      per_step: how many a step takes; over the steps, each is taken equally often, in a fresh order every time.
      row_multiple: batches have a multiple of so many rows; those beyond `per_step` are padding.
      seed: of the run.
      base: numbers of rows, ascending, and the base's hidden states of these; None where the model can give them.
    """

    rows: KeptBatch
    per_step: int
    row_multiple: int
    seed: int
    base: tuple[Int64[np.ndarray, "_"], Float[np.ndarray, "_ T D"]] | None = None

    def batch(self, step: int) -> KeptBatch:
        """The rows of a step, counted from 0: a function of the step alone."""
        return self.chosen(self._chosen(step), self.per_step + -self.per_step % self.row_multiple)

    def chosen(self, numbers: Int64[np.ndarray, "_"], count: int) -> KeptBatch:
        """The rows of these numbers, and padding up to so many."""
        found = KeptBatch(*(None if x is None else _padded(x[numbers], count) for x in self.rows))  # type: ignore[arg-type]
        if self.base is None:
            return found
        known, hidden = self.base
        return found._replace(base_hidden=_padded(hidden[np.searchsorted(known, numbers)], count))

    def reached(self, steps: int) -> Int64[np.ndarray, "_"]:
        """The numbers of the rows that the first so many steps see, ascending."""
        return np.sort(self._order(0)[: steps * self.per_step])

    def with_base(self, numbers: Int64[np.ndarray, "N"], hidden: Float[np.ndarray, "N T D"]) -> "KeptTexts":
        """The same with the base's hidden states of the rows of these numbers, ascending; no others can be taken."""
        return replace(self, base=(numbers, hidden))

    def digest(self) -> str:
        """SHA-256 of all texts in their order."""
        return hashlib.sha256(self.rows.tokens.tobytes() + self.rows.subtree_end.tobytes()).hexdigest()

    def _chosen(self, step: int) -> Int64[np.ndarray, "_"]:
        count = len(self.rows.tokens)
        first = step * self.per_step
        rounds = range(first // count, -(-(first + self.per_step) // count))
        order = np.concatenate([self._order(number) for number in rounds])
        return order[first - rounds[0] * count :][: self.per_step]

    def _order(self, number: int) -> Int64[np.ndarray, "_"]:
        """All rows in the order in which a round takes them."""
        return np.random.default_rng([self.seed, _ORDER, number]).permutation(len(self.rows.tokens))


def _padded(x: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((count - len(x), *x.shape[1:]), x.dtype)]) if len(x) < count else x


def kept_texts(
    texts: Sequence[Sequence[int]], *, length: int, per_step: int, row_multiple: int, seed: int
) -> KeptTexts:
    """Packs texts into rows of `length` tokens; a longer one is cut into pieces of so many.

    Args:
      texts: token ids; texts of one token predict nothing and are left out.
      length: of the rows.
      per_step: see `KeptTexts`, as the two that follow.
      row_multiple: see there.
      seed: see there.

    Raises:
      ValueError: no text has two tokens.
    """
    pieces = [
        np.array(text[start : start + length], dtype=np.int32)
        for text in texts
        for start in range(0, len(text), length)
        if len(text) - start > 1
    ]
    if not pieces:
        raise ValueError("there is no text of at least two tokens")
    sizes = np.array([piece.size for piece in pieces])
    row = first_fit(sizes, length)
    shape = (int(row.max()) + 1, length)
    tokens, positions, subtree_end, next_tokens = np.zeros((4, *shape), dtype=np.int32)
    weight = np.zeros(shape, dtype=np.float32)
    filled = np.zeros(shape[0], dtype=np.int64)
    for piece, r in zip(pieces, row.tolist(), strict=True):
        begin, end = int(filled[r]), int(filled[r]) + piece.size
        filled[r] = end
        tokens[r, begin:end] = piece
        positions[r, begin:end] = np.arange(piece.size)
        subtree_end[r, begin:end] = end
        next_tokens[r, begin : end - 1] = piece[1:]
        weight[r, begin : end - 1] = 1
    return KeptTexts(KeptBatch(tokens, positions, subtree_end, next_tokens, weight), per_step, row_multiple, seed)
