"""The batches of a run: any step's batch is a function of (seed, epoch, step), whatever was asked for before."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int32, Int64

from cft_jax.data.batch import Shape, TargetBatch, collate, fitting_shape, row_sizes, shape_levels
from cft_jax.data.examples import TrieExamples
from cft_jax.data.order import epoch_order, uniform_draws
from cft_jax.text.tree_rows import first_fit

# Tasks whose examples are made at once: enough to make NumPy's overhead small, few enough for some tens of MiB.
_TASKS_AT_ONCE = 2048
_SAMPLED_STEPS = 16


@runtime_checkable
class Source(Protocol):
    """Makes examples; `cft_jax.data.objectives` has them."""

    def examples(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """Examples of these tasks, from uniform numbers in [0, 1) where strings are drawn."""
        ...


@dataclass(frozen=True)
class Layout:
    """How the visits of an epoch become batches.

    Attributes:
      visits: how often an epoch visits a task.
      strings: strings drawn at a visit.
      tasks_per_step: visits in a step.
      row_tokens: None puts every example into a row of its own; a number packs them into rows of as many tokens, or as
        the longest example has.
      tries_whole: whether a visit needs a whole trie, of which only one step's are made at once.
      row_multiple: batches have a multiple of so many rows, so that they divide among devices and microbatches.
    """

    visits: int
    strings: int
    tasks_per_step: int
    row_tokens: int | None
    tries_whole: bool
    row_multiple: int


@dataclass(eq=False)
class Dataset:
    """Training batches in a balanced order.

    Attributes:
      source: makes the examples.
      layout: how they become batches.
      shared_prefix: tokens that all prompts begin with and that the batches leave out, for the model to be given once;
        may be empty.
      groups: of every task, for the balanced order.
      names: of every task.
      seed: of the run.
      epsilon: floor of soft targets; None for hard ones.
    """

    source: Source
    layout: Layout
    _: KW_ONLY
    shared_prefix: Int32[np.ndarray, "_"]
    groups: Sequence[str]
    names: Sequence[str]
    seed: int
    epsilon: float | None

    def __post_init__(self):
        self._steps_at_once = 1 if self.layout.tries_whole else max(1, _TASKS_AT_ONCE // self.layout.tasks_per_step)
        self._order: tuple[int, np.ndarray] | None = None
        self._chunk: tuple[tuple[int, int], TrieExamples, np.ndarray] | None = None

    @property
    def num_examples(self) -> int:
        """What an epoch counts: strings, or prompts where whole tries are used."""
        num_visits = len(self.groups) * self.layout.visits
        return num_visits if self.layout.tries_whole else num_visits * self.layout.strings

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch; the last may be partly padding."""
        return -(-len(self.groups) * self.layout.visits // self.layout.tasks_per_step)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes (B, T, P, K) of batches, but for rare larger ones; from the first steps of the first epoch."""
        return shape_levels(np.stack([self._in_rows(step)[3] for step in self._sampled]), self.layout.row_multiple)

    def batch(self, step: int) -> TargetBatch:
        """The batch of a step, counted from 0 through all epochs."""
        examples, chosen, row, size = self._in_rows(step)
        num_rows, *shape = fitting_shape(size, self.shapes, self.layout.row_multiple)
        return collate(
            examples,
            chosen,
            row,
            num_rows=num_rows,
            shape=(shape[0], shape[1], shape[2]),
            epsilon=self.epsilon,
            shared=self.shared_prefix.size,
        )

    def task_names(self, step: int) -> list[str]:
        """The tasks that a step visits."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return [self.names[int(task)] for task in self._tasks(epoch, index, 1)]

    @property
    def _sampled(self) -> range:
        """Steps that stand for all."""
        return range(min(self.steps_per_epoch, max(self._steps_at_once, _SAMPLED_STEPS)))

    def _tasks(self, epoch: int, index: int, num_steps: int) -> Int64[np.ndarray, "_"]:
        """The tasks of some steps of an epoch."""
        # By way of a local: a thread that prefetches may be asking for another epoch.
        order = self._order
        if order is None or order[0] != epoch:
            order = epoch, epoch_order(self.groups, self.layout.visits, seed=self.seed, epoch=epoch)
            self._order = order
        return order[1][index * self.layout.tasks_per_step : (index + num_steps) * self.layout.tasks_per_step]

    def _in_rows(self, step: int) -> tuple[TrieExamples, np.ndarray, np.ndarray, Int64[np.ndarray, "4"]]:
        """Examples, which of them are the step's, the row of each, and what the step needs: rows and their sizes."""
        examples, chosen, sizes = self._examples(step)
        if self.layout.row_tokens is None:
            rows = np.arange(chosen.size)
            num_rows = self.layout.tasks_per_step
        else:
            rows = first_fit(sizes[:, 0], max(self.layout.row_tokens, self._longest_example))
            order = np.argsort(rows, kind="stable")
            chosen, rows, sizes = chosen[order], rows[order], sizes[order]
            num_rows = int(rows[-1]) + 1
        return examples, chosen, rows, np.append(num_rows, row_sizes(sizes, rows))

    @cached_property
    def _longest_example(self) -> int:
        return max(int(self._examples(step)[2][:, 0].max()) for step in self._sampled)

    def _examples(self, step: int) -> tuple[TrieExamples, np.ndarray, Int64[np.ndarray, "B 3"]]:
        """Examples that hold the step's, which of them those are, and their sizes without the shared tokens."""
        epoch, index = divmod(step, self.steps_per_epoch)
        within = index % self._steps_at_once
        first, per_step, strings = index - within, self.layout.tasks_per_step, self.layout.strings
        made = self._chunk
        if made is None or made[0] != (epoch, first):
            tasks = self._tasks(epoch, first, self._steps_at_once)
            drawn = uniform_draws(first * per_step * strings, tasks.size * strings, seed=self.seed, epoch=epoch)
            examples = self.source.examples(tasks, drawn.reshape(-1, strings))
            made = (epoch, first), examples, examples.sizes() - np.array([self.shared_prefix.size, 0, 0])
            self._chunk = made
        _, examples, sizes = made
        begin, end = np.searchsorted(examples.task, [within * per_step, (within + 1) * per_step]).tolist()
        return examples, np.arange(begin, end), sizes[begin:end]


def common_prefix(prompts: Sequence[Int32[np.ndarray, "_"]]) -> Int32[np.ndarray, "_"]:
    """The longest prefix that all prompts have in common, but never a whole prompt."""
    shortest = min(prompt.size for prompt in prompts) - 1
    first = prompts[0][:shortest]
    same = np.ones(first.size, dtype=bool)
    for prompt in prompts:
        same &= prompt[:shortest] == first
    return first[: int(np.argmin(np.append(same, False)))]
