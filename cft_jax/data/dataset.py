"""The batches of a run: any step's batch is a function of (seed, epoch, step), whatever was asked for before."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int32, Int64

from cft_jax.data.batch import TargetBatch
from cft_jax.data.blocks import TrieExamples, joined_examples
from cft_jax.data.collate import collate, row_sizes
from cft_jax.data.order import epoch_order, uniform_draws
from cft_jax.data.shapes import Shape, fitting_shape, shape_levels
from cft_jax.text.tree_rows import first_fit

# Tasks whose blocks are made at once: enough to make NumPy's overhead small, few enough for some tens of MiB.
_TASKS_AT_ONCE = 2048
_SAMPLED_STEPS = 16


@runtime_checkable
class Source(Protocol):
    """Makes blocks; `cft_jax.data.soft` and `cft_jax.data.hard` have them."""

    def blocks(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """Blocks of these tasks, from uniform numbers in [0, 1) where strings are drawn."""
        ...


class Mixture:
    """Several sources, each for some of the tasks."""

    def __init__(self, sources: Sequence[Source], source_of: Int64[np.ndarray, "G"]):
        """Takes the sources and, for every task, which of them has it; a source numbers its tasks in their order."""
        self._sources = sources
        self._source_of = source_of
        self._number = np.empty_like(source_of)
        for index in range(len(sources)):
            mine = source_of == index
            self._number[mine] = np.arange(mine.sum())

    def blocks(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """Blocks of these tasks, in their order."""
        parts, places = [], []
        for index, source in enumerate(self._sources):
            where = np.flatnonzero(self._source_of[tasks] == index)
            if where.size:
                parts.append(source.blocks(self._number[tasks[where]], uniforms[where]))
                places.append(where)
        return parts[0] if len(parts) == 1 else joined_examples(parts, places)


@dataclass(frozen=True)
class Layout:
    """How the visits of an epoch become batches.

    Attributes:
      visits: how often an epoch visits a task.
      strings: strings drawn at a visit.
      tasks_per_step: visits in a step.
      row_tokens: None puts every block into a row of its own; a number packs blocks into rows of as many tokens, or
        as the longest block has.
      tries_whole: whether a visit needs a whole trie, of which only one step's are made at once.
      row_multiple: batches have a multiple of so many rows, so that they divide among devices and microbatches.
    """

    visits: int
    strings: int
    tasks_per_step: int
    row_tokens: int | None
    tries_whole: bool
    row_multiple: int


class Dataset:
    """Training batches in a balanced order.

    Attributes:
      shared_prefix: tokens that all prompts begin with and that the batches leave out, for the model to be given once.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        *,
        shared_prefix: Int32[np.ndarray, "_"],
        groups: Sequence[str],
        names: Sequence[str],
        seed: int,
        epsilon: float | None,
    ):
        """Takes what decides the order, the draws and the targets.

        Args:
          source: makes the blocks.
          layout: how they become batches.
          shared_prefix: tokens that all prompts begin with and that the batches shall leave out; may be empty.
          groups: of every task, for the balanced order.
          names: of every task.
          seed: of the run.
          epsilon: floor of soft targets; None for hard ones.
        """
        self.shared_prefix = shared_prefix
        self._source = source
        self._layout = layout
        self._groups = groups
        self._names = names
        self._seed = seed
        self._epsilon = epsilon
        self._steps_at_once = 1 if layout.tries_whole else max(1, _TASKS_AT_ONCE // layout.tasks_per_step)
        self._order: tuple[int, np.ndarray] | None = None
        self._chunk: tuple[tuple[int, int], TrieExamples, np.ndarray] | None = None

    @property
    def num_examples(self) -> int:
        """What an epoch counts: strings, or prompts where whole tries are used."""
        num_visits = len(self._groups) * self._layout.visits
        return num_visits if self._layout.tries_whole else num_visits * self._layout.strings

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch; the last may be partly padding."""
        return -(-len(self._groups) * self._layout.visits // self._layout.tasks_per_step)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes (B, T, P, K) of batches, but for rare larger ones; from the first steps of the first epoch."""
        steps = range(min(self.steps_per_epoch, max(self._steps_at_once, _SAMPLED_STEPS)))
        return shape_levels(np.stack([self._placed(step)[3] for step in steps]), self._layout.row_multiple)

    def batch(self, step: int, rows: tuple[int, int] | None = None) -> TargetBatch:
        """The batch of a step.

        Args:
          step: from 0, counted through all epochs.
          rows: first row and one past the last to return, for a host that feeds only these; the shape and the rows'
            content are those of the whole batch.
        """
        blocks, chosen, row, size = self._placed(step)
        num_rows, *shape = fitting_shape(size, self.shapes, self._layout.row_multiple)
        begin, end = (0, num_rows) if rows is None else rows
        if not 0 <= begin < end <= num_rows:
            raise ValueError(f"rows={rows} must lie in a batch of {num_rows} rows")
        mine = (row >= begin) & (row < end)
        return collate(
            blocks,
            chosen[mine],
            row[mine] - begin,
            num_rows=end - begin,
            shape=(shape[0], shape[1], shape[2]),
            epsilon=self._epsilon,
            shared=self.shared_prefix.size,
        )

    def task_names(self, step: int) -> list[str]:
        """The tasks that a step visits."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self._layout.tasks_per_step
        tasks = self._epoch(epoch)[first : first + self._layout.tasks_per_step]
        return [self._names[int(task)] for task in tasks]

    def _epoch(self, epoch: int) -> Int64[np.ndarray, "_"]:
        # By way of a local: a thread that prefetches may be asking for another epoch.
        order = self._order
        if order is None or order[0] != epoch:
            order = epoch, epoch_order(self._groups, self._layout.visits, seed=self._seed, epoch=epoch)
            self._order = order
        return order[1]

    def _placed(self, step: int) -> tuple[TrieExamples, np.ndarray, np.ndarray, Int64[np.ndarray, "4"]]:
        """Blocks, which of them are the step's, the row of each, and what the step needs: rows and their sizes."""
        blocks, chosen, sizes = self._blocks_of_step(step)
        if self._layout.row_tokens is None:
            rows = np.arange(chosen.size)
            num_rows = self._layout.tasks_per_step
        else:
            rows = first_fit(sizes[:, 0], max(self._layout.row_tokens, self._longest_block))
            order = np.argsort(rows, kind="stable")
            chosen, rows, sizes = chosen[order], rows[order], sizes[order]
            num_rows = int(rows[-1]) + 1
        return blocks, chosen, rows, np.append(num_rows, row_sizes(sizes, rows))

    @cached_property
    def _longest_block(self) -> int:
        steps = range(min(self.steps_per_epoch, max(self._steps_at_once, _SAMPLED_STEPS)))
        return max(int(self._blocks_of_step(step)[2][:, 0].max()) for step in steps)

    def _blocks_of_step(self, step: int) -> tuple[TrieExamples, np.ndarray, Int64[np.ndarray, "B 3"]]:
        """Blocks that hold the step's, which of them those are, and their sizes without the shared tokens."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chunk, within = divmod(index, self._steps_at_once)
        made = self._chunk
        if made is None or made[0] != (epoch, chunk):
            blocks = self._make_blocks(epoch, chunk)
            made = (epoch, chunk), blocks, blocks.sizes() - np.array([self.shared_prefix.size, 0, 0])
            self._chunk = made
        _, blocks, sizes = made
        per_step = self._layout.tasks_per_step
        first, last = np.searchsorted(blocks.task, [within * per_step, (within + 1) * per_step]).tolist()
        return blocks, np.arange(first, last), sizes[first:last]

    def _make_blocks(self, epoch: int, chunk: int) -> TrieExamples:
        per_chunk = self._steps_at_once * self._layout.tasks_per_step
        first = chunk * per_chunk
        tasks = self._epoch(epoch)[first : first + per_chunk]
        strings = self._layout.strings
        uniforms = uniform_draws(first * strings, tasks.size * strings, seed=self._seed, epoch=epoch)
        return self._source.blocks(tasks, uniforms.reshape(-1, strings))


def common_prefix(prompts: Sequence[Int32[np.ndarray, "_"]]) -> Int32[np.ndarray, "_"]:
    """The longest prefix that all prompts have in common, but never a whole prompt."""
    shortest = min(prompt.size for prompt in prompts) - 1
    first = prompts[0][:shortest]
    same = np.ones(first.size, dtype=bool)
    for prompt in prompts:
        same &= prompt[:shortest] == first
    return first[: int(np.argmin(np.append(same, False)))]
