"""Sums along the paths of a trie, from the empty prefix down."""

import numpy as np
from jaxtyping import Float, Float64

from cft_jax.text.trie import Trie


def sum_from_root(trie: Trie, per_prefix: Float[np.ndarray, "M"]) -> Float64[np.ndarray, "M"]:
    """Sum over every prefix and those above it."""
    total = per_prefix.astype(np.float64)
    for depth in range(1, trie.max_depth + 1):
        level = np.flatnonzero(trie.depth == depth)
        total[level] += total[trie.parent[level]]
    return total


def prefix_log_probs(trie: Trie, child_log_probs: Float[np.ndarray, "K"]) -> Float64[np.ndarray, "M"]:
    """Log-probabilities that a text begins with each prefix, from those of every next token.

    Args:
      trie: the trie.
      child_log_probs: ln of the probability of each child given its prefix, as `trie.child_ids`.
    """
    per_prefix = np.zeros(trie.num_prefixes)
    inner = trie.child_prefix >= 0
    per_prefix[trie.child_prefix[inner]] = child_log_probs[inner]
    return sum_from_root(trie, per_prefix)


def string_log_probs(trie: Trie, child_log_probs: Float[np.ndarray, "K"]) -> Float64[np.ndarray, "N"]:
    """Log-probabilities of the whole strings, terminator included, in the order of the output space."""
    ends = trie.child_ids == trie.terminator_id
    parents = np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))
    end_log_probs = np.full(trie.num_prefixes, np.nan)
    end_log_probs[parents[ends]] = child_log_probs[ends]
    return (prefix_log_probs(trie, child_log_probs) + end_log_probs)[trie.leaf_prefix]
