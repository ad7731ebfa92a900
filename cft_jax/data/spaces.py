"""The output spaces of many tasks: drawing values, writing them, and their token ids, for all tasks at once."""

from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float64, Int32, Int64

from cft_jax.config import DataConfig
from cft_jax.distributions.analytic_space import AnalyticSpace, analytic_space
from cft_jax.distributions.configured import space_settings
from cft_jax.distributions.output_space import (
    NumberSpace,
    OutputSpace,
    decimal_strings,
    thinned_integers,
)
from cft_jax.distributions.tasks import Task
from cft_jax.text.trie import Forest, grow_forest
from cft_jax.text.values import ValueEncoder

# The default quantiles alone leave out 0.001 at each end where tails are dropped.
_WORTH_A_WARNING = 0.01

ListedSpace = OutputSpace | NumberSpace
Space = ListedSpace | AnalyticSpace


def task_space(task: Task, data: DataConfig) -> Space:
    """A task's output space: its listed values, or its family discretised as the configuration says.

    Raises:
      UserError: the family's parameters or the settings are impossible.
    """
    if task.spec is not None and data.space == "full":
        return analytic_space(task.spec, num_decimals=data.num_decimals, quantile=data.full_quantile)
    return task.grid(space_settings(data))


def warn_of_lost_mass(tasks: Sequence[Task], lost_mass: Float64[np.ndarray, "G"]) -> None:
    """Says once, of all tasks, how many lose much of their probability, and which one most."""
    worst = int(lost_mass.argmax())
    if lost_mass[worst] > _WORTH_A_WARNING:
        logging.warning(
            "%d of %d prompts lose more than %g %% of their probability, task %s even %.2g %%: the values do not reach "
            "so far; raise config.data.max_bins, or set config.data.space=full",
            (lost_mass > _WORTH_A_WARNING).sum(),
            len(tasks),
            100 * _WORTH_A_WARNING,
            tasks[worst].task_id,
            100 * lost_mass[worst],
        )


class SpaceTable:
    """Output spaces by number. A value is named by a code: its integer in an analytic space, its index in a listed one.

    Of a listed space of numbers only the cumulative probabilities are kept, not the strings.

    Attributes:
      lost_mass: how much of each task's probability none of its values stands for.
    """

    def __init__(self, spaces: Iterable[Space]):
        """Reads each space once, so that an iterator need not hold them all."""
        grids, lost, self._others, self._cumulative = [], [], {}, {}
        for index, space in enumerate(spaces):
            lost.append(0.0 if isinstance(space, AnalyticSpace) else space.lost_mass)
            if isinstance(space, NumberSpace):
                grids.append((space.first, space.range_size, space.probabilities.size, space.num_decimals))
            else:
                self._others[index] = space
                decimals = space.num_decimals if isinstance(space, AnalyticSpace) else -1
                grids.append((0, 0, 0, decimals))
            if not isinstance(space, AnalyticSpace):
                self._cumulative[index] = np.cumsum(space.probabilities)
        self.lost_mass = np.array(lost)
        columns = np.array(grids, dtype=np.float64).reshape(-1, 4).T
        self._first, self._range_size = columns[:2]
        # A count of 0 marks an analytic space, decimals of -1 a space of listed strings.
        self._count, self._decimals = columns[2:].astype(np.int64)

    def draw(self, tasks: Int64[np.ndarray, "R"], uniforms: Float64[np.ndarray, "R M"]) -> Int64[np.ndarray, "R M"]:
        """The codes at these quantiles, numbers in [0, 1), of each task's space."""
        drawn = np.empty(uniforms.shape, dtype=np.int64)
        for row, task in enumerate(tasks.tolist()):
            space = self._others.get(task)
            if isinstance(space, AnalyticSpace):
                drawn[row] = space.draw(uniforms[row])
            else:
                drawn[row] = draw_indices(self._cumulative[task], uniforms[row])
        return drawn

    def encode(
        self, encoder: ValueEncoder, tasks: Int64[np.ndarray, "S"], codes: Int64[np.ndarray, "S"]
    ) -> tuple[Int32[np.ndarray, "S T"], Int64[np.ndarray, "S"]]:
        """Token ids of values, -1 after the end of a row, and their numbers."""
        found = []
        decimals = self._decimals[tasks]
        for num_decimals in np.unique(decimals).tolist():
            where = np.flatnonzero(decimals == num_decimals)
            if num_decimals < 0:
                values = [self.write(*pair) for pair in zip(tasks[where].tolist(), codes[where].tolist(), strict=True)]
                found.append((where, *encoder.strings(values)))
            else:
                found.append((where, *encoder.numbers(self._integers(tasks[where], codes[where]), num_decimals)))
        tokens = np.full((tasks.size, max((rows.shape[1] for _, rows, _ in found), default=0)), -1, dtype=np.int32)
        lengths = np.zeros(tasks.size, dtype=np.int64)
        for where, rows, counts in found:
            tokens[where, : rows.shape[1]] = rows
            lengths[where] = counts
        return tokens, lengths

    def write(self, task: int, code: int) -> str:
        """The string of a value."""
        space = self._others.get(task)
        if isinstance(space, OutputSpace):
            return space.values[code]
        return decimal_strings(self._integers(np.array([task]), np.array([code])), int(self._decimals[task]))[0]

    def longest(self, task: int, beyond: int) -> Int64[np.ndarray, "_"]:
        """Codes of values among which are all of more than `beyond` tokens, if there are any."""
        space = self._others.get(task)
        if isinstance(space, AnalyticSpace):
            return np.array([space.first, space.last])
        if isinstance(space, OutputSpace):
            # A token is at least one byte, but for one that some tokenizers put in front.
            return np.flatnonzero([len(value.encode()) >= beyond for value in space.values])
        return np.array([0, self._count[task] - 1])

    def _integers(self, tasks: Int64[np.ndarray, "S"], codes: Int64[np.ndarray, "S"]) -> np.ndarray:
        if not self._count[tasks].all():
            # Integers of an analytic space may be larger than doubles can tell apart; grids and these never mix.
            return codes
        return thinned_integers(self._first[tasks], self._range_size[tasks], self._count[tasks], codes)


def listed_forest(
    encoder: ValueEncoder, spaces: Sequence[ListedSpace], names: Sequence[str], terminator_id: int
) -> Forest:
    """The tries of listed spaces.

    Args:
      encoder: of the tokenizer.
      spaces: the output spaces.
      names: of the tasks, for errors.
      terminator_id: the token that ends every value.

    Raises:
      UserError: two values of a space have the same tokens, or one contains the terminator.
    """
    table = SpaceTable(spaces)
    sizes = [space.probabilities.size for space in spaces]
    tasks = np.repeat(np.arange(len(spaces)), sizes)
    codes = np.concatenate([np.arange(size) for size in sizes])
    tokens, lengths = table.encode(encoder, tasks, codes)
    return grow_forest(
        tokens,
        lengths,
        tasks,
        np.concatenate([space.probabilities for space in spaces]),
        terminator_id=terminator_id,
        describe=lambda row: f"task {names[int(tasks[row])]}: value {table.write(int(tasks[row]), int(codes[row]))!r}",
    )


def draw_indices(cumulative: Float64[np.ndarray, "N"], uniforms: Float64[np.ndarray, "M"]) -> Int64[np.ndarray, "M"]:
    """The indices at these quantiles, numbers in [0, 1); one without probability is never drawn."""
    drawn = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    # Rounding may lift a quantile to the very end.
    return np.minimum(drawn, np.searchsorted(cumulative, cumulative[-1], side="left"))
