"""The rows of tokens in which a model reads a trie, and the next tokens it is asked about: numpy alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from cft_jax.common.errors import UserError
from cft_jax.generate.prefill import bucket
from cft_jax.text.trie import Trie


@dataclass(frozen=True, eq=False)
class Chunk:
    """One row: the ancestors of its first prefix, then prefixes in depth-first order, and what is asked of these.

    Attributes:
      tokens, depth: of the row's prefixes; the empty prefix's token is -1.
      subtree_end: as in `Transformer.hidden`.
      entries: which of the questions' entries are asked here.
      entry_index: place in the row of the prefix that an entry follows.
      entry_ids: the entries' tokens.
    """

    tokens: Int[np.ndarray, "T"]
    depth: Int[np.ndarray, "T"]
    subtree_end: Int[np.ndarray, "T"]
    entries: slice
    entry_index: Int[np.ndarray, "E"]
    entry_ids: Int[np.ndarray, "E"]


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Prefixes of a trie, numbered afresh in their order, and the next tokens (entries) asked of each.

    Attributes:
      tokens, parent, depth, subtree_end: of the prefixes, as in `Trie`.
      entry_offsets: prefix i asks for entries entry_offsets[i] to entry_offsets[i + 1].
      entry_ids: their tokens: a prefix's children, then, after a whole string, the other stop ids.
      children: the children of the trie that are asked for.
      child_entries: the entries of these.
      leaves: the values of the output space whose whole strings are among the prefixes.
      stop_entries: the entries of the O other stop ids after each of these.
    """

    tokens: Int[np.ndarray, "M"]
    parent: Int[np.ndarray, "M"]
    depth: Int[np.ndarray, "M"]
    subtree_end: Int[np.ndarray, "M"]
    entry_offsets: Int[np.ndarray, "_"]
    entry_ids: Int[np.ndarray, "E"]
    children: Int[np.ndarray, "A"]
    child_entries: Int[np.ndarray, "A"]
    leaves: Int[np.ndarray, "S"]
    stop_entries: Int[np.ndarray, "S O"]

    @classmethod
    def of(cls, trie: Trie, stop_ids: Int[np.ndarray, "_"], prefixes: Int[np.ndarray, "_"] | None) -> "ScoreRequest":
        """All children of the given prefixes (None: of every prefix), and the stop ids after whole strings.

        Raises:
          ValueError: a prefix comes without its ancestors.
        """
        chosen = np.arange(trie.num_prefixes) if prefixes is None else np.unique(prefixes)
        number = np.full(trie.num_prefixes + 1, -1)
        number[chosen] = np.arange(chosen.size)
        parent = number[trie.parent[chosen]]
        if chosen.size == 0 or chosen[0] != 0 or (parent[1:] < 0).any():
            raise ValueError("prefixes to score must come with all their ancestors, the empty prefix among them")
        others = stop_ids[stop_ids != trie.terminator_id]
        leaves = np.flatnonzero(number[trie.leaf_prefix] >= 0)
        leaf = number[trie.leaf_prefix[leaves]]
        num_children = np.diff(trie.child_offsets)[chosen]
        sizes = num_children.copy()
        sizes[leaf] += others.size
        offsets = np.append(0, sizes.cumsum())
        rank = np.arange(num_children.sum()) - np.repeat(num_children.cumsum() - num_children, num_children)
        children = np.repeat(trie.child_offsets[:-1][chosen], num_children) + rank
        child_entries = np.repeat(offsets[:-1], num_children) + rank
        stop_entries = (offsets[leaf] + num_children[leaf])[:, None] + np.arange(others.size)
        ids = np.empty(offsets[-1], np.int32)
        ids[child_entries] = trie.child_ids[children]
        ids[stop_entries] = others
        return cls(
            tokens=trie.token[chosen],
            parent=parent,
            depth=trie.depth[chosen],
            subtree_end=np.searchsorted(chosen, trie.subtree_end[chosen]),
            entry_offsets=offsets,
            entry_ids=ids,
            children=children,
            child_entries=child_entries,
            leaves=leaves,
            stop_entries=stop_entries,
        )

    def chunks(self, length: int) -> Iterator[Chunk]:
        """Rows of at most `length` tokens that hold every prefix once, the rows' ancestors aside.

        Raises:
          UserError: a string is too long for a row.
        """
        start, size = 0, self.tokens.size
        while start < size:
            above = self._ancestors(start)
            if above.size >= length:
                raise UserError(
                    f"a value of the output space has {above.size} tokens; at most {length - 1} can be scored"
                )
            stop = min(start + length - above.size, size)
            inside = np.concatenate([above, np.arange(start, stop)])
            entries = slice(*self.entry_offsets[[start, stop]].tolist())
            counts = np.diff(self.entry_offsets[start : stop + 1])
            yield Chunk(
                tokens=self.tokens[inside],
                depth=self.depth[inside],
                subtree_end=np.minimum(self.subtree_end[inside], stop) - start + above.size,
                entries=entries,
                entry_index=np.repeat(np.arange(above.size, inside.size), counts),
                entry_ids=self.entry_ids[entries],
            )
            start = stop

    def _ancestors(self, prefix: int) -> Int[np.ndarray, "_"]:
        found = np.empty(self.depth[prefix], np.int64)
        for place in range(found.size)[::-1]:
            prefix = found[place] = self.parent[prefix]
        return found


def pack(
    chunks: Sequence[tuple[int, Chunk]], prompts: Sequence[Sequence[int]], *, rows: int, length: int
) -> dict[str, Any]:
    """The arrays of one forward pass over some chunks, each with the index of its prompt.

    Returns:
      tokens, positions, subtree_end: int32[rows, length].
      prompt: int32[rows], whose cache each row continues.
      queries: int32[rows * length], the places, in the flattened rows, of the prefixes asked about; the first
        `num_queries` count.
      entry_query, entry_ids: int32[E], each entry's query and token; the first `num_entries` count.
    """
    shape = (rows, length)
    tokens, positions, subtree_end = (np.zeros(shape, np.int32) for _ in range(3))
    prompt = np.zeros(rows, np.int32)
    places, ids = [], []
    for row, (index, chunk) in enumerate(chunks):
        size = chunk.tokens.size
        last = prompts[index][-1]
        tokens[row, :size] = np.where(chunk.tokens < 0, last, chunk.tokens)
        positions[row, :size] = len(prompts[index]) - 1 + chunk.depth
        subtree_end[row, :size] = chunk.subtree_end
        prompt[row] = index
        places.append(row * length + chunk.entry_index)
        ids.append(chunk.entry_ids)
    asked, entry_query = np.unique(np.concatenate(places), return_inverse=True)
    queries = np.zeros(rows * length, np.int32)
    queries[: asked.size] = asked
    padding = (0, bucket(entry_query.size, least=2 * rows * length) - entry_query.size)
    return {
        "tokens": tokens,
        "positions": positions,
        "subtree_end": subtree_end,
        "prompt": prompt,
        "queries": queries,
        "num_queries": np.int32(asked.size),
        "entry_query": np.pad(entry_query, padding).astype(np.int32),
        "entry_ids": np.pad(np.concatenate(ids), padding).astype(np.int32),
        "num_entries": np.int32(entry_query.size),
    }


def spread(
    trie: Trie, questions: ScoreRequest, log_probs: Float64[np.ndarray, "E"]
) -> tuple[Float64[np.ndarray, "K"], Float64[np.ndarray, "N"]]:
    """Answers by child of the trie, and by value ln of the sum over the other stop ids; NaN where nothing was asked."""
    children = np.full(trie.child_ids.size, np.nan)
    children[questions.children] = log_probs[questions.child_entries]
    stops = np.full(trie.leaf_prefix.size, np.nan)
    stops[questions.leaves] = np.logaddexp.reduce(log_probs[questions.stop_entries], axis=1, initial=-np.inf)
    return children, stops
