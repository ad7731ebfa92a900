"""Blocks of soft targets: drawn strings or whole tries, of listed spaces or at full resolution."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int32, Int64

from cft_jax.data.blocks import TrieExamples, examples_of_strings, examples_of_tries, split_examples
from cft_jax.data.spaces import draw_indices
from cft_jax.text.analytic_trie import AnalyticTrie, drawn_forest
from cft_jax.text.trie import Forest

Prompts = Sequence[Int32[np.ndarray, "_"]]


@dataclass(frozen=True, eq=False)
class DrawnPaths:
    """Strings drawn from listed spaces (`path`, `paths`).

    Attributes:
      forest: the trie of every task.
      prompts: of every task.
      task_weights: what a string of each task weighs; 1 on average.
      per_position: whether a string's weight is the mean over its steps or the sum.
    """

    forest: Forest
    prompts: Prompts
    task_weights: Float64[np.ndarray, "G"]
    per_position: bool

    def blocks(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """A block per task with as many drawn strings as there are uniform numbers."""
        drawn = [draw_indices(self._cumulative[task], row) for task, row in zip(tasks.tolist(), uniforms, strict=True)]
        num_blocks, per_block = uniforms.shape
        return examples_of_strings(
            self.forest,
            [self.prompts[task] for task in tasks.tolist()],
            tasks,
            np.repeat(np.arange(num_blocks), per_block),
            np.concatenate(drawn),
            np.repeat(self.task_weights[tasks], per_block),
            np.full(num_blocks, float(per_block)),
            per_position=self.per_position,
        )

    @cached_property
    def _cumulative(self) -> list[np.ndarray]:
        probabilities, starts = self.forest.arrays["leaf_probs"], self.forest.leaf_starts
        return [np.cumsum(probabilities[a:b]) for a, b in itertools.pairwise(starts)]


@dataclass(frozen=True, eq=False)
class WholeTries:
    """All strings of listed spaces with their probabilities (`exact`).

    Attributes:
      forest, prompts, task_weights, per_position: as in `DrawnPaths`.
      max_nodes: prefixes in one block; longer tries become several blocks.
    """

    forest: Forest
    prompts: Prompts
    task_weights: Float64[np.ndarray, "G"]
    per_position: bool
    max_nodes: int

    def blocks(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """At least a block per task; the uniform numbers are not needed."""
        starts = self.forest.leaf_starts
        leaves = [self.forest.arrays["leaf_probs"][starts[task] : starts[task + 1]] for task in tasks]
        strings = [np.flatnonzero(probabilities) for probabilities in leaves]
        string_block = np.repeat(np.arange(tasks.size), [found.size for found in strings])
        probabilities = np.concatenate([leaf[found] for leaf, found in zip(leaves, strings, strict=True)])
        blocks = examples_of_strings(
            self.forest,
            [self.prompts[task] for task in tasks.tolist()],
            tasks,
            string_block,
            np.concatenate(strings),
            probabilities * self.task_weights[tasks][string_block],
            np.ones(tasks.size),
            per_position=self.per_position,
        )
        return split_examples(blocks, self.max_nodes)


@dataclass(frozen=True, eq=False)
class AnalyticPaths:
    """Strings drawn at full resolution (`path`, `paths`); every prefix on their way has all its children.

    Attributes:
      tries: of every task.
      prompts, task_weights, per_position: as in `DrawnPaths`.
    """

    tries: Sequence[AnalyticTrie]
    prompts: Prompts
    task_weights: Float64[np.ndarray, "G"]
    per_position: bool

    def blocks(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """A block per task with as many drawn strings as there are uniform numbers."""
        tries = [self.tries[task] for task in tasks.tolist()]
        drawn = [trie.space.draw(row) for trie, row in zip(tries, uniforms, strict=True)]
        num_blocks, per_block = uniforms.shape
        return examples_of_strings(
            drawn_forest(tries, drawn),
            [self.prompts[task] for task in tasks.tolist()],
            np.arange(num_blocks),
            np.repeat(np.arange(num_blocks), per_block),
            np.tile(np.arange(per_block), num_blocks),
            np.repeat(self.task_weights[tasks], per_block),
            np.full(num_blocks, float(per_block)),
            per_position=self.per_position,
        )


@dataclass(frozen=True, eq=False)
class AnalyticTries:
    """The most probable prefixes at full resolution, and below them drawn strings without bias (`exact`).

    Attributes:
      tries, prompts, task_weights, per_position: as in `AnalyticPaths`.
      max_nodes: prefixes in one block, and how many of the most probable prefixes are taken.
    """

    tries: Sequence[AnalyticTrie]
    prompts: Prompts
    task_weights: Float64[np.ndarray, "G"]
    per_position: bool
    max_nodes: int

    def blocks(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """At least a block per task, with a drawn string per uniform number."""
        tries, weights = [], []
        for task, row in zip(tasks.tolist(), uniforms, strict=True):
            full = self.tries[task]
            part = full.expand(self.max_nodes, _ANY_DEPTH, full.space.draw(row))
            tries.append(part.trie)
            step_weights = part.mean_weights if self.per_position else part.sequence_weights
            weights.append(step_weights * self.task_weights[task])
        prompts = [self.prompts[task] for task in tasks.tolist()]
        return split_examples(examples_of_tries(tries, prompts, weights, np.ones(tasks.size)), self.max_nodes)


# Deeper than any number: a sign, a point and 18 digits.
_ANY_DEPTH = 32
