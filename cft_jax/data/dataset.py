"""The batches of a run: any step's batch is a function of (seed, epoch, step), whatever was asked for before."""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from jaxtyping import Float64, Int64

from cft_jax.data.batch import TargetBatch
from cft_jax.data.order import epoch_order, uniform_draws
from cft_jax.data.rows import Rows, collate, joined_rows
from cft_jax.data.shapes import Shape, fitting_shape, shape_levels

# Rows made at once: enough to make NumPy's overhead small, few enough for some tens of MiB.
_ROWS_AT_ONCE = 2048
_SAMPLED_STEPS = 4


class Source(Protocol):
    """Makes rows; `cft_jax.data.soft` and `cft_jax.data.hard` have them."""

    def rows(self, tasks: Int64[np.ndarray, "R"], uniforms: Float64[np.ndarray, "R M"]) -> Rows:
        """Rows of these tasks, from uniform numbers in [0, 1) where strings are drawn."""
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

    def rows(self, tasks: Int64[np.ndarray, "R"], uniforms: Float64[np.ndarray, "R M"]) -> Rows:
        """Rows of these tasks, in their order."""
        parts, places = [], []
        for index, source in enumerate(self._sources):
            where = np.flatnonzero(self._source_of[tasks] == index)
            if where.size:
                parts.append(source.rows(self._number[tasks[where]], uniforms[where]))
                places.append(where)
        return parts[0] if len(parts) == 1 else joined_rows(parts, places)


class Dataset:
    """Training batches in a balanced order.

    Attributes:
      num_examples: what an epoch counts: strings, or prompts for `exact`.
      steps_per_epoch: number of batches in an epoch; the last may be partly padding.
      shapes: the shapes (T, P, K) that batches have, but for rare larger ones.
    """

    def __init__(
        self,
        source: Source,
        *,
        groups: Sequence[str],
        names: Sequence[str],
        seed: int,
        visits: int,
        strings_per_row: int,
        tasks_per_step: int,
        epsilon: float | None,
        rows_vary: bool,
    ):
        """Takes what decides the order, the draws and the targets.

        Args:
          source: makes the rows.
          groups: of every task, for the balanced order.
          names: of every task.
          seed: of the run.
          visits: how often an epoch visits a task.
          strings_per_row: strings drawn at a visit.
          tasks_per_step: tasks visited in a step.
          epsilon: floor of soft targets; None for hard ones.
          rows_vary: whether a task may need several rows; batches then have a multiple of `tasks_per_step` rows.
        """
        self._source = source
        self._groups = groups
        self._names = names
        self._seed = seed
        self._visits = visits
        self._strings_per_row = strings_per_row
        self._tasks_per_step = tasks_per_step
        self._epsilon = epsilon
        self._rows_vary = rows_vary
        self._steps_at_once = 1 if rows_vary else max(1, _ROWS_AT_ONCE // tasks_per_step)
        self._order: tuple[int, np.ndarray] | None = None
        self._chunk: tuple[tuple[int, int], Rows, np.ndarray] | None = None
        num_visits = len(groups) * visits
        self.num_examples = num_visits if rows_vary else num_visits * strings_per_row
        self.steps_per_epoch = -(-num_visits // tasks_per_step)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Computed from the first steps of the first epoch."""
        steps = min(self.steps_per_epoch, max(self._steps_at_once, _SAMPLED_STEPS))
        return shape_levels(np.stack([self._rows_of_step(step)[2] for step in range(steps)]))

    def batch(self, step: int, rows: tuple[int, int] | None = None) -> TargetBatch:
        """The batch of a step, counted from the beginning of training.

        Args:
          step: from 0, through all epochs.
          rows: first row and one past the last to return, for a host that feeds only these; the shape and the rows'
            content are those of the whole batch.
        """
        found, (first, last), size = self._rows_of_step(step)
        num_rows = self._tasks_per_step
        if self._rows_vary:
            num_rows *= max(1, -(-(last - first) // self._tasks_per_step))
        begin, end = (0, num_rows) if rows is None else rows
        if not 0 <= begin < end <= num_rows:
            raise ValueError(f"rows={rows} must lie in a batch of {num_rows} rows")
        return collate(
            found,
            min(first + begin, last),
            min(first + end, last),
            num_rows=end - begin,
            shape=fitting_shape(size, self.shapes),
            epsilon=self._epsilon,
        )

    def task_names(self, step: int) -> list[str]:
        """The tasks that a step visits, one after another."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self._tasks_per_step
        tasks = self._epoch(epoch)[first : first + self._tasks_per_step]
        return [self._names[int(task)] for task in tasks]

    def _epoch(self, epoch: int) -> Int64[np.ndarray, "_"]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self._groups, self._visits, seed=self._seed, epoch=epoch)
        return self._order[1]

    def _rows_of_step(self, step: int) -> tuple[Rows, tuple[int, int], Int64[np.ndarray, "3"]]:
        """Rows that hold the step's, the range of the step's among them, and the largest sizes in that range."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chunk, within = divmod(index, self._steps_at_once)
        if self._chunk is None or self._chunk[0] != (epoch, chunk):
            rows = self._chunk_rows(epoch, chunk)
            self._chunk = (epoch, chunk), rows, rows.sizes()
        _, rows, sizes = self._chunk
        first, last = np.searchsorted(
            rows.task, [within * self._tasks_per_step, (within + 1) * self._tasks_per_step]
        ).tolist()
        return rows, (first, last), sizes[first:last].max(axis=0)

    def _chunk_rows(self, epoch: int, chunk: int) -> Rows:
        per_chunk = self._steps_at_once * self._tasks_per_step
        first = chunk * per_chunk
        tasks = self._epoch(epoch)[first : first + per_chunk]
        m = self._strings_per_row
        uniforms = uniform_draws(first * m, tasks.size * m, seed=self._seed, epoch=epoch)
        return self._source.rows(tasks, uniforms.reshape(-1, m))
