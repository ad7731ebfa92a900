"""Prefix tries over token sequences, as flat arrays that can be memory-mapped.

A prefix of a listed string's tokens, the empty one included, has children: the tokens that can follow it, the
terminator after a whole string among them, with their probabilities given the prefix (arXiv 2605.11845, soft targets).
Prefixes are numbered depth-first, children in ascending token id, so that all prefixes below a prefix are contiguous.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.distributions.output_space import OutputSpace
from cft_jax.text.tokenizer import encode_strings

# The arrays of a trie and their types by what they run over.
_PREFIX_ARRAYS = dict.fromkeys(("token", "parent", "depth", "subtree_end"), np.int32) | {"reach": np.float64}
_CHILD_ARRAYS = {"child_ids": np.int32, "child_probs": np.float64, "child_prefix": np.int32}
_LEAF_ARRAYS = {"leaf_prefix": np.int32, "leaf_probs": np.float64}
# `child_offsets` has one more entry per trie than there are prefixes.
ARRAYS = {**_PREFIX_ARRAYS, "child_offsets": np.int64, **_CHILD_ARRAYS, **_LEAF_ARRAYS}
# In `child_prefix`: the token leads to a prefix that the trie does not hold.
CUT = -2


@dataclass(frozen=True, eq=False)
class Trie:
    """The trie of one output space. M prefixes (number 0 is the empty one), K children, N values.

    Attributes:
      token: last token of each prefix; -1 for the empty one.
      parent: the prefix without its last token; -1 for the empty one.
      depth: number of tokens.
      subtree_end: one past the last prefix below: j is i or an ancestor of i exactly if j <= i < subtree_end[j].
      reach: probability that a drawn string begins with the prefix.
      child_offsets: the children of prefix i are entries child_offsets[i] to child_offsets[i + 1] of the next three.
      child_ids: token ids, ascending within a prefix.
      child_probs: probability of the token given the prefix; 0 where the prefix itself has no probability.
      child_prefix: the prefix that the token leads to; -1 for the terminator; `CUT` where a trie holds only part of
        the prefixes (`analytic_trie`) and not that one.
      leaf_prefix: the prefix that is the whole string of each value, in the order of the output space.
      leaf_probs: probability of each value.
      terminator_id: the token that ends every string.
    """

    token: Int32[np.ndarray, "M"]
    parent: Int32[np.ndarray, "M"]
    depth: Int32[np.ndarray, "M"]
    subtree_end: Int32[np.ndarray, "M"]
    reach: Float64[np.ndarray, "M"]
    child_offsets: Int64[np.ndarray, "_"]
    child_ids: Int32[np.ndarray, "K"]
    child_probs: Float64[np.ndarray, "K"]
    child_prefix: Int32[np.ndarray, "K"]
    leaf_prefix: Int32[np.ndarray, "N"]
    leaf_probs: Float64[np.ndarray, "N"]
    terminator_id: int

    @property
    def num_prefixes(self) -> int:
        """Number of prefixes, the empty one and complete strings included."""
        return self.token.size

    @property
    def max_children(self) -> int:
        """The largest number of tokens that can follow one prefix."""
        return int(np.diff(self.child_offsets).max())

    @property
    def max_depth(self) -> int:
        """Tokens of the longest string, without the terminator."""
        return int(self.depth.max())

    def find(self, prefix: Sequence[int]) -> int:
        """The number of the prefix with these tokens.

        Raises:
          KeyError: no string begins so.
        """
        found = 0
        for token in prefix:
            first, last = self.child_offsets[found : found + 2]
            child = first + np.searchsorted(self.child_ids[first:last], token)
            if child == last or self.child_ids[child] != token or self.child_prefix[child] < 0:
                raise KeyError(tuple(prefix))
            found = int(self.child_prefix[child])
        return found

    def children(self, prefix: Sequence[int]) -> tuple[Int32[np.ndarray, "C"], Float64[np.ndarray, "C"]]:
        """Token ids that can follow a prefix, ascending, and their probabilities.

        Raises:
          KeyError: no string begins with `prefix`.
        """
        found = self.find(prefix)
        entries = slice(self.child_offsets[found], self.child_offsets[found + 1])
        return self.child_ids[entries], self.child_probs[entries]

    def leaves(self) -> tuple[list[tuple[int, ...]], Float64[np.ndarray, "N"]]:
        """The token ids of every value, without the terminator, and their probabilities, as in the output space."""
        tokens = np.full((self.leaf_prefix.size, self.max_depth), -1, dtype=np.int32)
        prefix = self.leaf_prefix.copy()
        for _ in range(self.max_depth):
            rows = np.flatnonzero(prefix > 0)
            tokens[rows, self.depth[prefix[rows]] - 1] = self.token[prefix[rows]]
            prefix[rows] = self.parent[prefix[rows]]
        lengths = self.depth[self.leaf_prefix]
        return [tuple(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)], self.leaf_probs


@dataclass(frozen=True, eq=False)
class Forest:
    """The tries of G output spaces in shared arrays, one after another; prefixes are numbered within each trie.

    Attributes:
      arrays: the arrays of `Trie` by name, each a concatenation over the tries.
      prefix_starts, child_starts, leaf_starts: where the tries begin in them; the last entry is the total.
      terminator_id: the token that ends every string.
    """

    arrays: dict[str, np.ndarray]
    prefix_starts: Int64[np.ndarray, "_"]
    child_starts: Int64[np.ndarray, "_"]
    leaf_starts: Int64[np.ndarray, "_"]
    terminator_id: int

    def __len__(self) -> int:
        return self.prefix_starts.size - 1

    def trie(self, index: int) -> Trie:
        """One of the tries, as views."""
        bounds = {
            **dict.fromkeys(_PREFIX_ARRAYS, slice(*self.prefix_starts[index : index + 2])),
            **dict.fromkeys(_CHILD_ARRAYS, slice(*self.child_starts[index : index + 2])),
            **dict.fromkeys(_LEAF_ARRAYS, slice(*self.leaf_starts[index : index + 2])),
            "child_offsets": slice(self.prefix_starts[index] + index, self.prefix_starts[index + 1] + index + 1),
        }
        return Trie(
            **{name: self.arrays[name][where] for name, where in bounds.items()}, terminator_id=self.terminator_id
        )


def build_trie(tokenizer: PreTrainedTokenizerBase, output_space: OutputSpace, terminator_id: int) -> Trie:
    """The trie of an output space, every value encoded alone and without special tokens.

    Raises:
      UserError: two values have the same tokens, or the terminator is among a value's tokens.
    """
    values = output_space.values
    tokens, lengths = token_matrix(encode_strings(tokenizer, values))
    return grow_forest(
        tokens,
        lengths,
        np.zeros(len(values), dtype=np.int64),
        output_space.probabilities,
        terminator_id=terminator_id,
        describe=lambda row: f"value {values[row]!r}",
    ).trie(0)


def token_matrix(sequences: Sequence[Sequence[int]]) -> tuple[Int32[np.ndarray, "S T"], Int64[np.ndarray, "S"]]:
    """Token ids as the rows of a matrix, -1 after the end of a sequence, and the sequences' lengths."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = np.full((lengths.size, int(lengths.max(initial=0))), -1, dtype=np.int32)
    flat = np.array([token for sequence in sequences for token in sequence], dtype=np.int32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    return tokens, lengths


def grow_forest(
    tokens: Int32[np.ndarray, "S T"],
    lengths: Int64[np.ndarray, "S"],
    groups: Int64[np.ndarray, "S"],
    probabilities: Float64[np.ndarray, "S"],
    *,
    terminator_id: int,
    describe: Callable[[int], str],
) -> Forest:
    """Tries of several lists of token sequences at once.

    Args:
      tokens: a sequence per row, without the terminator, -1 after its end.
      lengths: numbers of tokens.
      groups: the trie that each row belongs to: 0, 1, 2, ... ascending, none left out.
      probabilities: of each row; those of a trie should sum to 1.
      terminator_id: the token that ends every sequence.
      describe: names a row in errors.

    Raises:
      UserError: two rows of a trie have the same tokens, or the terminator is among a row's tokens.
    """
    ended = np.flatnonzero((tokens == terminator_id).any(axis=1))
    if ended.size:
        raise UserError(f"{describe(int(ended[0]))} contains the terminator, token {terminator_id}, in its tokens")
    order = _sorted_rows(tokens, groups)
    tokens, lengths, groups, masses = tokens[order], lengths[order], groups[order], probabilities[order]
    common = _common_prefixes(tokens, lengths, groups)
    twice = np.flatnonzero(common == lengths)
    if twice.size:
        first, second = sorted(int(order[row]) for row in (twice[0] - 1, twice[0]))
        raise UserError(f"{describe(first)} and {describe(second)} have the same tokens; merge them or drop one")
    prefixes = _prefixes(tokens, lengths, common, masses)
    node_of_leaf = prefixes.pop("leaf")
    children = _children(prefixes, node_of_leaf, masses, terminator_id)
    starts = np.append(np.flatnonzero(prefixes["depth"] == 0), prefixes["depth"].size)
    trie_of_prefix = np.repeat(np.arange(starts.size - 1), np.diff(starts))
    child_starts = children["child_offsets"][starts]
    leaf_starts = np.searchsorted(groups, np.arange(starts.size))
    arrays = {**prefixes, **children, **_leaves(order, node_of_leaf - starts[groups], masses)}
    _number_within_tries(arrays, starts, child_starts, trie_of_prefix)
    return Forest(arrays, starts, child_starts, leaf_starts.astype(np.int64), terminator_id)


def _sorted_rows(tokens: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The order of rows by trie, then by tokens; the end of a sequence (-1) sorts before every token."""
    # Two tokens make one key of 64 bits, which halves the passes of the sort.
    shifted = tokens.astype(np.int64) + 1
    if shifted.shape[1] % 2:
        shifted = np.pad(shifted, ((0, 0), (0, 1)))
    keys = (shifted[:, ::2] << 32) | shifted[:, 1::2]
    return np.lexsort((*keys.T[::-1], groups))


def _common_prefixes(tokens: np.ndarray, lengths: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Number of tokens that each sorted row shares with the row before; -1 for the first row of a trie."""
    common = np.full(lengths.size, -1, dtype=np.int64)
    same = np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1).sum(axis=1)
    common[1:] = np.where(groups[1:] == groups[:-1], np.minimum(same, lengths[1:]), -1)
    return common


def _prefixes(tokens: np.ndarray, lengths: np.ndarray, common: np.ndarray, masses: np.ndarray) -> dict[str, np.ndarray]:
    """The prefix arrays, numbered through all tries, and under "leaf" the prefix that ends each sorted row."""
    num_rows, width = tokens.shape
    depths = np.arange(width + 1)
    # A row brings the prefixes that are longer than what it shares with the row before. Row by row and by depth,
    # that is the depth-first order.
    is_new = (depths > common[:, None]) & (depths <= lengths[:, None])
    row, depth = np.nonzero(is_new)
    number = np.where(is_new, is_new.ravel().cumsum().reshape(is_new.shape) - 1, -1)
    number = np.maximum.accumulate(number, axis=0)
    parent = np.where(depth > 0, number[row, depth - 1], -1)
    token = np.where(depth > 0, tokens[row, depth - 1] if width else -1, -1)
    first_of_row = np.append(0, is_new.sum(axis=1).cumsum())
    subtree_end = np.empty(row.size, dtype=np.int64)
    reach = np.empty(row.size)
    for level in depths:
        begins = np.flatnonzero(common < level)
        new = np.flatnonzero(is_new[:, level])
        ends = np.append(begins, num_rows)[np.searchsorted(begins, new) + 1]
        subtree_end[number[new, level]] = first_of_row[ends]
        # Rows between two groups of a level are shorter than the level, so they belong to neither.
        if new.size:
            reach[number[new, level]] = np.add.reduceat(np.where(lengths >= level, masses, 0.0), new)
    leaf = number[np.arange(num_rows), lengths]
    return {
        "token": token.astype(np.int32),
        "parent": parent,
        "depth": depth.astype(np.int32),
        "subtree_end": subtree_end,
        "reach": reach,
        "leaf": leaf,
    }


def _children(
    prefixes: dict[str, np.ndarray], leaf: np.ndarray, masses: np.ndarray, terminator_id: int
) -> dict[str, np.ndarray]:
    inner = np.flatnonzero(prefixes["depth"] > 0)
    parent = np.concatenate([prefixes["parent"][inner], leaf])
    token = np.concatenate([prefixes["token"][inner], np.full(leaf.size, terminator_id, dtype=np.int32)])
    mass = np.concatenate([prefixes["reach"][inner], masses])
    leads_to = np.concatenate([inner, np.full(leaf.size, -1)])
    order = np.argsort((parent << 32) | token, kind="stable")
    reach = prefixes["reach"][parent]
    probability = np.divide(mass, reach, out=np.zeros_like(mass), where=reach > 0)
    return {
        "child_offsets": np.append(0, np.bincount(parent, minlength=prefixes["depth"].size).cumsum()),
        "child_ids": token[order],
        "child_probs": probability[order],
        "child_prefix": leads_to[order],
    }


def _leaves(order: np.ndarray, leaf: np.ndarray, masses: np.ndarray) -> dict[str, np.ndarray]:
    """The leaf arrays in the order of the values; rows were sorted within their trie, so tries stay contiguous."""
    leaf_prefix = np.empty(order.size, dtype=np.int32)
    leaf_probs = np.empty(order.size)
    leaf_prefix[order], leaf_probs[order] = leaf, masses
    return {"leaf_prefix": leaf_prefix, "leaf_probs": leaf_probs}


def _number_within_tries(
    arrays: dict[str, np.ndarray], starts: np.ndarray, child_starts: np.ndarray, trie_of_prefix: np.ndarray
) -> None:
    """Turns numbers that run through all tries into numbers within each."""
    first = starts[trie_of_prefix]
    arrays["parent"] = np.where(arrays["parent"] < 0, -1, arrays["parent"] - first).astype(np.int32)
    arrays["subtree_end"] = (arrays["subtree_end"] - first).astype(np.int32)
    num_children = np.diff(arrays["child_offsets"])
    first_of_child = np.repeat(first, num_children)
    leads_to = arrays["child_prefix"]
    arrays["child_prefix"] = np.where(leads_to < 0, -1, leads_to - first_of_child).astype(np.int32)
    # One more entry per trie than prefixes: the end of a trie's children as well as the beginning of the next's.
    offsets = np.insert(arrays["child_offsets"][:-1], starts[1:], child_starts[1:])
    arrays["child_offsets"] = offsets - np.repeat(child_starts[:-1], np.diff(starts) + 1)
