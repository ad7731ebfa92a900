"""Metrics along the paths of a trie: what the model says at every step of writing a value.

`child_log_probs` float64[K] are the model's ln q(child | prompt, prefix) for every edge of the trie, in the order of
`trie.child_ids`; NaN where the model was not asked.
"""

import numpy as np
from jaxtyping import Float, Int

from cft_jax.text.paths import sum_from_root
from cft_jax.text.trie import Trie


def step_kl(trie: Trie, child_log_probs: Float[np.ndarray, "K"], epsilon: float) -> Float[np.ndarray, "M"]:
    """KL from the trie's target to the model's next-token distribution at every prefix, in nats.

    The target is clamped at `epsilon` and renormalised, the model's softmax is over the whole vocabulary, as in
    training at temperature 1. Prefixes without probability have no target and count 0; no path of a drawn string
    passes through them. NaN where the model was not asked.
    """
    starts, sizes = trie.child_offsets[:-1], np.diff(trie.child_offsets)
    clamped = np.maximum(trie.child_probs, epsilon)
    total = np.repeat(np.add.reduceat(clamped, starts), sizes)
    q = np.divide(clamped, total, out=np.zeros_like(clamped), where=total > 0)
    log_q = np.log(q, out=np.zeros_like(q), where=q > 0)
    kl = np.add.reduceat(q * (log_q - child_log_probs), starts)
    return np.where(trie.reach > 0, kl, 0.0)


def path_kl(trie: Trie, steps: Float[np.ndarray, "M"]) -> Float[np.ndarray, "N"]:
    """Mean of the steps' KL along the path of every string, from the empty prefix to the whole string."""
    return (sum_from_root(trie, steps)[trie.leaf_prefix]) / (trie.depth[trie.leaf_prefix] + 1)


def path_prefixes(trie: Trie, strings: Int[np.ndarray, "S"]) -> Int[np.ndarray, "R"]:
    """The prefixes on the paths of these strings, ascending: what must be scored to know their `path_kl`."""
    found = np.unique(trie.leaf_prefix[strings])
    frontier = found
    while (frontier := np.unique(trie.parent[frontier[frontier > 0]])).size:
        found = np.union1d(found, frontier)
    return found
