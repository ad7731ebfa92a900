"""Metrics of a prompt whose answers are too many to list: every string of the given decimals. Pure.

The model is asked about the most probable prefixes and about those of a few drawn strings. The children that are not
followed, and the terminators, cut the strings into *cells*: every string lies in exactly one, and the model's
probability of a cell is known. The KL is a sum over prefixes (the chain rule), exact at the most probable ones and
estimated without bias below them from the drawn strings.
"""

import numpy as np
from jaxtyping import Float, Int

from cft_jax.evaluate.metrics import exact, paths, sound
from cft_jax.evaluate.metrics.target import FamilyTarget
from cft_jax.evaluate.suites.structured.prompt_metrics import Metrics, finite, rounded
from cft_jax.generate import TrieScore
from cft_jax.text.analytic_trie import AnalyticTrie, Expansion
from cft_jax.text.paths import sum_from_root

# A plot's resolution, and the share of the target that it leaves out on each side.
_PLOT_BINS = 120
_PLOT_TAIL = 0.002


def cell_sections(
    full: AnalyticTrie, expansion: Expansion, score: TrieScore, target: FamilyTarget, epsilon: float
) -> Metrics:
    """Sections of the prompt's record.

    Args:
      full: the space and its tokens.
      expansion: the scored part of its trie.
      score: the model's, for all of it.
      target: scale of the values.
      epsilon: floor of the targets in the path KL.

    Returns:
      `exact` with `kl` over whole strings; `estimate` with `kl_standard_error` of its estimated part; `exact_cells`
      with the metrics of `exact_figures` over the cells, where `kl` and `total_variation` are at most those over
      strings and `support_mass` is at least theirs; `exact_cells_scaled`; `path` with `logit_kl_as_trained`;
      `calibration`; `distribution`, what plots need.
    """
    trie = expansion.trie
    kl, error = _over_strings(expansion, paths.step_kl(trie, score.child_log_probs, 0.0), per_step=False)
    path, _ = _over_strings(expansion, paths.step_kl(trie, score.child_log_probs, epsilon), per_step=True)
    cells = _cells(expansion)
    parents = np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))[cells]
    masses = trie.reach[parents] * trie.child_probs[cells]
    log_probs = score.prefix_log_probs[parents] + score.child_log_probs[cells]
    numbers = full.child_numbers(trie, cells)
    metrics = exact.distances(masses, log_probs, numbers)
    scaled = sound.in_interquartile_ranges(metrics["wasserstein_1"], target) if "wasserstein_1" in metrics else None
    return {
        "exact": finite({"kl": kl}),
        "estimate": finite({"kl_standard_error": error}),
        "exact_cells": finite(metrics),
        "exact_cells_scaled": finite({"wasserstein_1_over_iqr": scaled}),
        "path": finite({"logit_kl_as_trained": path}),
        "calibration": rounded(exact.calibration_bins(masses, log_probs, numbers)[1]),
        "distribution": _distribution(masses, np.exp(log_probs), numbers, full.space.num_decimals),
    }


def _over_strings(expansion: Expansion, steps: Float[np.ndarray, "M"], *, per_step: bool) -> tuple[float, float]:
    """Expectation over the target's strings of the sum (or mean) of their steps, and its standard error."""
    trie, is_exact = expansion.trie, expansion.exact
    weights = expansion.mean_weights if per_step else expansion.sequence_weights
    known = float(weights[is_exact] @ steps[is_exact])
    below = sum_from_root(trie, np.where(is_exact, 0.0, steps))[trie.leaf_prefix]
    if per_step:
        below = below / (trie.depth[trie.leaf_prefix] + 1)
    return known + float(below.mean()), float(below.std(ddof=1) / np.sqrt(below.size))


def _cells(expansion: Expansion) -> Int[np.ndarray, "C"]:
    """The children of exact prefixes that are no exact prefixes themselves: they share out all strings."""
    trie = expansion.trie
    parents = np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))
    followed = np.zeros(trie.child_prefix.size, dtype=bool)
    inner = trie.child_prefix >= 0
    followed[inner] = expansion.exact[trie.child_prefix[inner]]
    return np.flatnonzero(expansion.exact[parents] & ~followed)


def _distribution(
    target: Float[np.ndarray, "C"], model: Float[np.ndarray, "C"], numbers: Float[np.ndarray, "C"], num_decimals: int
) -> Metrics:
    """The cells' masses in bins of equal width around the middle of the target."""
    order = np.argsort(numbers)
    cumulative = np.cumsum(target[order])
    low, high = numbers[order][np.minimum(np.searchsorted(cumulative, [_PLOT_TAIL, 1 - _PLOT_TAIL]), numbers.size - 1)]
    edges = np.linspace(low, high, _PLOT_BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    inside = (numbers >= edges[0]) & (numbers <= edges[-1])
    place = np.clip(np.searchsorted(edges, numbers[inside], side="right") - 1, 0, edges.size - 2)
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "kind": "continuous",
        "values": [f"{middle:.{num_decimals + 2}f}" for middle in middles],
        "target": rounded(np.bincount(place, weights=target[inside], minlength=middles.size)),
        "model": rounded(np.bincount(place, weights=model[inside], minlength=middles.size)),
    }
