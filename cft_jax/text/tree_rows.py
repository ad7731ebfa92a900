"""Trees of tokens in rows: cut where they are too long, packed where they are short, padded to few shapes. NumPy alone.

A tree stands depth-first, so that the tokens below one follow it without a gap: token i sees token j of its tree
exactly if j <= i < subtree_end[j]. Training and scoring lay out their tries with these functions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, Int64


@dataclass(frozen=True, eq=False)
class TreeRow:
    """A part of a tree that fits a row.

    Attributes:
      nodes: which of the tree's nodes: the ancestors of the part's first, then the part, depth-first.
      num_ancestors: how many of them are ancestors, which other parts hold too.
      subtree_end: one past the last node below, counted from the row's first; never beyond the row.
    """

    nodes: Int64[np.ndarray, "T"]
    num_ancestors: int
    subtree_end: Int64[np.ndarray, "T"]


def cut_tree(subtree_end: Int[np.ndarray, "M"], length: int) -> Iterator[TreeRow]:
    """Parts of at most `length` nodes, ancestors included, that together hold every node once beside its repetitions.

    Args:
      subtree_end: of a tree depth-first, one past the last node below each.
      length: more than the depth of any node.

    Raises:
      ValueError: `length` is too small for a node with its ancestors.
    """
    start, above = 0, np.empty(0, dtype=np.int64)
    while start < subtree_end.size:
        if above.size >= length:
            raise ValueError(f"length={length} has no room for a node and its {above.size} ancestors")
        stop = min(start + length - above.size, subtree_end.size)
        nodes = np.concatenate([above, np.arange(start, stop)])
        ends = subtree_end[nodes].astype(np.int64)
        yield TreeRow(nodes, above.size, np.minimum(ends, stop) - start + above.size)
        # Ancestors of the next part's first node are in this row: what it descends from begins before it.
        start, above = stop, nodes[ends > stop]


def first_fit(lengths: Int64[np.ndarray, "B"], capacity: int) -> Int64[np.ndarray, "B"]:
    """The row that each tree goes to, so that few rows of `capacity` tokens hold all: first fit, longest first.

    A tree longer than the capacity has a row of its own.
    """
    rows = np.zeros(lengths.size, dtype=np.int64)
    left: list[int] = []
    for tree in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[tree])
        row = next((row for row, room in enumerate(left) if length <= room), len(left))
        if row == len(left):
            left.append(capacity)
        left[row] -= length
        rows[tree] = row
    return rows


def bucket(count: int, *, least: int, factor: int = 2) -> int:
    """The smallest of least, least * factor, least * factor^2, ... that holds `count`: few sizes are compiled."""
    size = least
    while size < count:
        size *= factor
    return size


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A tree of tokens, and the next tokens whose probabilities are asked for.

    Attributes:
      tokens, positions, subtree_end: as in `Transformer.hidden`, counted from the tree's first token.
      target_index: the token that each target follows.
      target_ids: token ids of the targets.
    """

    tokens: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    subtree_end: Int[np.ndarray, "T"]
    target_index: Int[np.ndarray, "E"]
    target_ids: Int[np.ndarray, "E"]


def padded_rows(
    packed: Sequence[Sequence[TokenTree]], *, num_rows: int, length: int
) -> dict[str, Int32[np.ndarray, "..."]]:
    """The arrays of one forward pass.

    Args:
      packed: the trees of each row, together at most `length` tokens.
      num_rows: of the arrays; those beyond the given ones are padding.
      length: of a row.

    Returns:
      tokens, positions, subtree_end: int32[num_rows, length], 0 where padded.
      queries: int32[num_rows * length], the tokens that any target follows, as indices of the flattened rows; the
        first `num_queries` count.
      target_query, target_ids: int32[E], the query and the token of every target, in the order of the trees; the first
        `num_targets` count.
    """
    tokens, positions, subtree_end = (np.zeros((num_rows, length), np.int32) for _ in range(3))
    indices, ids = [], []
    for row, trees in enumerate(packed):
        start = 0
        for tree in trees:
            own = slice(start, start + tree.tokens.size)
            tokens[row, own], positions[row, own] = tree.tokens, tree.positions
            subtree_end[row, own] = start + tree.subtree_end
            indices.append(row * length + start + tree.target_index)
            ids.append(tree.target_ids)
            start = own.stop
    asked, target_query = np.unique(np.concatenate(indices), return_inverse=True)
    queries = np.zeros(num_rows * length, np.int32)
    queries[: asked.size] = asked
    padding = (0, bucket(target_query.size, least=2 * queries.size) - target_query.size)
    return {
        "tokens": tokens,
        "positions": positions,
        "subtree_end": subtree_end,
        "queries": queries,
        "num_queries": np.asarray(asked.size, np.int32),
        "target_query": np.pad(target_query.astype(np.int32), padding),
        "target_ids": np.pad(np.concatenate(ids).astype(np.int32), padding),
        "num_targets": np.asarray(target_query.size, np.int32),
    }


def ranges(starts: Int[np.ndarray, "N"], counts: Int[np.ndarray, "N"]) -> Int64[np.ndarray, "_"]:
    """start, start + 1, ..., start + count - 1 of every pair, one after another."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
