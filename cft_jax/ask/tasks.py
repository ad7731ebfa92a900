"""Tasks made in Python: what a row of `data.custom` says, with values from SciPy or from counts."""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically
from cft_jax.distributions import Task as PreparedTask
from cft_jax.distributions.custom import task_of_row
from cft_jax.distributions.output_space import frozen_space
from cft_jax.distributions.splits import TRAIN
from cft_jax.distributions.tasks import SpaceSettings

Prompt = str | Sequence[Mapping[str, str]]


@runtime_checkable
class Counts(Protocol):
    """A mapping from values to counts, or pandas' `Series.value_counts()`."""

    def items(self) -> Iterable[tuple[Hashable, Any]]: ...


@dataclass(frozen=True)
class Task:
    """A prompt and the distribution that its answers should follow.

    Attributes:
      prompt: the user's message, or a list of {"role", "content"} that ends with the user's.
      values: different answers, exactly as they are to be written; whole numbers stand for their digits, other numbers
        must be given as texts.
      probabilities: of the values; they sum to 1.
      split: "train", or "test_unseen_params" or "test_ood_family" for prompts that are only evaluated.
      weight: how much the task counts in the loss.

    Raises:
      UserError: on construction, one of them is wrong.
    """

    prompt: Prompt
    values: Sequence[str | int | float]
    probabilities: Sequence[float]
    split: str = TRAIN
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.prepared(1)

    @classmethod
    def from_scipy(
        cls,
        prompt: Prompt,
        distribution: Any,
        *,
        split: str = TRAIN,
        weight: float = 1.0,
        **settings: Any,
    ) -> "Task":
        """Numbers that follow a frozen distribution of `scipy.stats`, such as `scipy.stats.expon(scale=2)`.

        They are discretised as the families' own prompts are: `settings` are the fields of `SpaceSettings`, named as in
        `config.data`, by default num_decimals=5 and max_bins=1001.

        Raises:
          UserError: it is no frozen distribution of one variable, or has no such values.
        """
        space = frozen_space(distribution, **vars(SpaceSettings(**settings))).listed()
        return cls(prompt, space.values, space.probabilities.tolist(), split, weight)

    @classmethod
    def from_counts(cls, prompt: Prompt, counts: Counts, *, split: str = TRAIN, weight: float = 1.0) -> "Task":
        """Answers as often as they were counted: a mapping, a `Counter`, or `column.value_counts()` of pandas.

        Raises:
          UserError: a value is no text and no whole number, or nothing was counted.
        """
        numbers = Counter({_plain(value): int(count) for value, count in counts.items()})
        if not numbers.total():
            raise UserError("nothing was counted; at least one value must have occurred")
        probabilities = [count / numbers.total() for count in numbers.values()]
        return cls(prompt, tuple(numbers), probabilities, split, weight)

    def row(self) -> dict[str, Any]:
        """The task as a row of `data.custom`."""
        question = "prompt" if isinstance(self.prompt, str) else "messages"
        return {
            question: self.prompt if isinstance(self.prompt, str) else [dict(message) for message in self.prompt],
            "values": [_plain(value) for value in self.values],
            "probabilities": [float(share) for share in self.probabilities],
            "split": self.split,
            "weight": float(self.weight),
        }

    def prepared(self, number: int) -> PreparedTask:
        """The task as training and evaluation have it, under this number."""
        return task_of_row(self.row(), number)


def write_tasks(path: Path, tasks: Iterable[Task]) -> bool:
    """Writes tasks as a file for `data.custom`, unless there is one that holds the same; returns whether it wrote.

    Raises:
      UserError: the file holds other tasks.
    """
    text = "".join(json.dumps(task.row(), ensure_ascii=False) + "\n" for task in tasks)
    if not path.exists():
        write_atomically(path, text)
        return True
    if path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} holds the tasks of another run; name a new workdir")
    return False


def _plain(value: Any) -> Any:
    """A value without NumPy's or pandas' type around it."""
    return value.item() if hasattr(value, "item") else value
