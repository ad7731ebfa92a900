"""Exact metrics of a prompt, from the model's probabilities along a trie of its answers. Pure.

Where the answers can be listed, the model scores all of them. Where they are too many (every string of the given
decimals), it is asked about the most probable prefixes and about those of a few drawn strings. The children that are
not followed, and the terminators, cut the strings into *cells*: every string lies in exactly one, and the model's
probability of a cell is known. The KL is a sum over prefixes (the chain rule), exact at the most probable ones and
estimated without bias below them from the drawn strings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cft_jax.distributions.families import find_family
from cft_jax.distributions.output_space import OutputSpace
from cft_jax.distributions.tasks import Task
from cft_jax.evaluate.metrics import exact, paths
from cft_jax.evaluate.metrics.target import Target
from cft_jax.evaluate.suites.structured.outline import binned, outline, wrong_prefixes
from cft_jax.evaluate.suites.structured.prompt_metrics import Metrics, finite, scaled_distance, target_of_task
from cft_jax.evaluate.suites.structured.settings import Resolution
from cft_jax.generate import TrieScore
from cft_jax.text.analytic_trie import AnalyticTrie, Expansion
from cft_jax.text.paths import sum_from_root
from cft_jax.text.trie import Trie

# A plot's resolution.
_PLOT_BINS = 120
_LONGEST_PROMPT = 400
TextOf = Callable[[Sequence[int]], str]


@dataclass(frozen=True, eq=False)
class ListedPlan:
    """Exact metrics over listed values; the model must score the whole of `trie`."""

    task: Task
    space: OutputSpace
    trie: Trie
    resolution: Resolution

    def sections(self, score: TrieScore, text_of: TextOf, *, keep_distribution: bool) -> Metrics:
        """Sections of the prompt's record; `text_of` is the text of tokens.

        Returns:
          `exact` (see `metrics.exact`), `exact_scaled` (Wasserstein-1 in interquartile ranges), `calibration` (the
          model's mass in bins of equal target mass), `other_stops`, the mass that ends a value by another stop token,
          `path` with `logit_kl_as_trained`, the expectation of the path KL over strings drawn from the target,
          `outline` and `wrong_prefixes` (see `outline`), and where it is to be kept `distribution`, what plots need.
        """
        target, log_probs = self.space.probabilities, score.string_log_probs
        numbers = exact.as_numbers(self.space.values)
        scale = target_of_task(self.task, self.resolution.grid.num_decimals)
        sections = _distances("exact", target, log_probs, numbers, scale)
        sections["other_stops"] = {"mass": float(np.exp(score.other_stop_log_probs).sum())}
        drawn = target > 0
        expected = target[drawn] @ path_kl(self.trie, score, self.resolution.epsilon)[drawn]
        sections["path"] = finite({"logit_kl_as_trained": float(expected)})
        sections["outline"] = _text(self.task) | outline(self.space.values, numbers, target, np.exp(log_probs))
        sections["wrong_prefixes"] = wrong_prefixes(self.trie, score.child_log_probs, text_of)
        if keep_distribution:
            kind = "text" if numbers is None else "discrete"
            if self.task.spec is not None:
                kind = find_family(self.task.spec.family_id).kind
            masses = {"target": _rounded(target), "model": _rounded(np.exp(log_probs))}
            sections["distribution"] = _named(self.task) | {"kind": kind, "values": list(self.space.values)} | masses
        return sections


@dataclass(frozen=True, eq=False)
class AnalyticPlan:
    """Metrics of a space at full resolution; the model must score the whole of `trie`, the scored part of its trie."""

    task: Task
    full: AnalyticTrie
    expansion: Expansion
    resolution: Resolution

    @property
    def trie(self) -> Trie:
        return self.expansion.trie

    def sections(self, score: TrieScore, text_of: TextOf, *, keep_distribution: bool) -> Metrics:
        """Sections of the prompt's record; `text_of` is the text of tokens.

        Returns:
          `exact` with `kl` over whole strings; `estimate` with `kl_standard_error` of its estimated part; `exact_cells`
          with the metrics of `ListedPlan`'s `exact` over the cells, where `kl` and `total_variation` are at most those
          over strings and `support_mass` is at least theirs; `exact_cells_scaled`; `path` with `logit_kl_as_trained`;
          `calibration`; `outline` and `wrong_prefixes`; and where it is to be kept `distribution`, what plots need.
        """
        trie, is_exact = self.trie, self.expansion.exact
        kl, error = self._over_strings(paths.step_kl(trie, score.child_log_probs, 0.0), per_step=False)
        path, _ = self._over_strings(paths.step_kl(trie, score.child_log_probs, self.resolution.epsilon), per_step=True)
        # The cells: children of exact prefixes that are no exact prefixes themselves. They share out all strings.
        parents = np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))
        followed = (trie.child_prefix >= 0) & is_exact[np.maximum(trie.child_prefix, 0)]
        cells = np.flatnonzero(is_exact[parents] & ~followed)
        parents = parents[cells]
        masses = trie.reach[parents] * trie.child_probs[cells]
        log_probs = score.prefix_log_probs[parents] + score.child_log_probs[cells]
        numbers = self.full.child_numbers(trie, cells)
        num_decimals = self.full.space.num_decimals
        sections: Metrics = {"exact": finite({"kl": kl}), "estimate": finite({"kl_standard_error": error})}
        sections |= _distances("exact_cells", masses, log_probs, numbers, target_of_task(self.task, num_decimals))
        sections["path"] = finite({"logit_kl_as_trained": path})
        sections["outline"] = _text(self.task) | outline(None, numbers, masses, np.exp(log_probs))
        sections["wrong_prefixes"] = wrong_prefixes(trie, score.child_log_probs, text_of)
        if keep_distribution:
            plot = _distribution(masses, np.exp(log_probs), numbers, num_decimals)
            sections["distribution"] = _named(self.task) | plot
        return sections

    def _over_strings(self, steps: Float[np.ndarray, "M"], *, per_step: bool) -> tuple[float, float]:
        """Expectation over the target's strings of the sum (or mean) of their steps, and its standard error."""
        trie, is_exact = self.trie, self.expansion.exact
        weights = self.expansion.mean_weights if per_step else self.expansion.sequence_weights
        known = float(weights[is_exact] @ steps[is_exact])
        below = sum_from_root(trie, np.where(is_exact, 0.0, steps))[trie.leaf_prefix]
        if per_step:
            below = below / (trie.depth[trie.leaf_prefix] + 1)
        return known + float(below.mean()), float(below.std(ddof=1) / np.sqrt(below.size))


def path_kl(trie: Trie, score: TrieScore, epsilon: float) -> Float[np.ndarray, "N"]:
    """The path KL of every string: the mean over its steps, in nats."""
    return paths.path_kl(trie, paths.step_kl(trie, score.child_log_probs, epsilon))


def _distances(
    name: str,
    target: Float[np.ndarray, "C"],
    log_probs: Float[np.ndarray, "C"],
    numbers: Float[np.ndarray, "C"] | None,
    scale: Target | None,
) -> Metrics:
    metrics = exact.distances(target, log_probs, numbers)
    calibration = _rounded(exact.calibration_bins(target, log_probs, numbers)[1])
    return {name: finite(metrics)} | scaled_distance(f"{name}_scaled", metrics, scale) | {"calibration": calibration}


def _distribution(
    target: Float[np.ndarray, "C"], model: Float[np.ndarray, "C"], numbers: Float[np.ndarray, "C"], num_decimals: int
) -> Metrics:
    """The cells' masses in bins of equal width around the middle of the target."""
    edges, (shown, answered) = binned(numbers, target, model, _PLOT_BINS)
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "kind": "continuous",
        "values": [f"{middle:.{num_decimals + 2}f}" for middle in middles],
        "target": _rounded(shown),
        "model": _rounded(answered),
    }


def _named(task: Task) -> Metrics:
    """A prompt's name for plots: `title` and `parameters`."""
    if task.spec is None:
        return {"title": task.messages[-1]["content"], "parameters": {}}
    return {"title": find_family(task.spec.family_id).display_name, "parameters": dict(task.spec.parameters)}


def _text(task: Task) -> Metrics:
    """A prompt's name, and `prompt`, the beginning of its text."""
    return _named(task) | {"prompt": task.messages[-1]["content"][:_LONGEST_PROMPT]}


def _rounded(values: Float[np.ndarray, "N"]) -> list[float]:
    """Six significant digits, enough for a plot and a quarter of the bytes."""
    return [float(f"{value:.6g}") for value in values]
