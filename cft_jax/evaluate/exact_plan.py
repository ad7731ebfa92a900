"""What to ask the model about one prompt for its exact figures, and the figures from its answers."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from cft_jax.distributions.output_space import OutputSpace
from cft_jax.distributions.tasks import SpaceSettings, Task
from cft_jax.evaluate import prompt_figures as figures
from cft_jax.evaluate.metrics import paths
from cft_jax.generate import TrieScore
from cft_jax.text.trie import Trie

# The paper scores its path KL at 2 decimals, whatever the training resolution, on 4 strings per prompt.
PAPER_PATH_DECIMALS = 2
PAPER_PATH_DRAWS = 4

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class PromptCodec:
    """How a suite turns messages and answers into tokens.

    Attributes:
      encode: messages → token ids of the prompt.
      build_trie: output space → trie, in the model's tokens with the trained terminator.
      name: identifies both: part of a result's fingerprint.
    """

    encode: Callable[[Messages], list[int]]
    build_trie: Callable[[OutputSpace], Trie]
    name: str


@dataclass(frozen=True, eq=False)
class ListedPlan:
    """Exact figures over listed values, and the path KL at the paper's resolution and at that of training.

    Attributes:
      task: the task.
      space, trie: its listed values at the resolution of training.
      paper_trie: its values at the paper's resolution.
      paper_draws: the values of `paper_trie` whose paths are scored.
      settings: the resolution of training.
      epsilon: floor of the targets in the path KL.
    """

    task: Task
    space: OutputSpace
    trie: Trie
    paper_trie: Trie
    paper_draws: Int[np.ndarray, "S"]
    settings: SpaceSettings
    epsilon: float

    @classmethod
    def of(cls, task: Task, codec: PromptCodec, settings: SpaceSettings, *, epsilon: float, seed: int) -> "ListedPlan":
        """The plan of a task; its draws depend on the seed and the task alone."""
        space = task.output_space(settings)
        paper_space = task.output_space(replace(settings, num_decimals=PAPER_PATH_DECIMALS))
        draws = figures.path_draws(paper_space, PAPER_PATH_DRAWS, task_rng(task, seed, "path"))
        tries = codec.build_trie(space), codec.build_trie(paper_space)
        return cls(task, space, *tries, draws, settings, epsilon)

    @property
    def paper_prefixes(self) -> Int[np.ndarray, "R"]:
        """The prefixes of `paper_trie` that `sections` needs scored; of `trie` it needs all."""
        return paths.path_prefixes(self.paper_trie, self.paper_draws)

    def sections(self, whole: TrieScore, drawn: TrieScore, *, keep_distribution: bool) -> figures.Figures:
        """The sections of the prompt's record; with `distribution`, what plots need, where it is to be kept.

        Args:
          whole: of `trie`.
          drawn: of `paper_trie` at `paper_prefixes`.
          keep_distribution: whether to keep it.
        """
        target = figures.target_of_task(self.task, self.space, self.settings.num_decimals)
        sections = figures.exact_section(self.space, whole, target)
        sections["path"] = figures.finite(
            {
                "logit_kl": figures.mean_path_kl(self.paper_trie, drawn, self.paper_draws, self.epsilon),
                "logit_kl_as_trained": figures.expected_path_kl(self.space, self.trie, whole, self.epsilon),
            }
        )
        if keep_distribution:
            sections["distribution"] = figures.distribution_section(self.task, self.space, whole)
        return sections


def task_rng(task: Task, seed: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on the seed, the task and what they are for, and on nothing else."""
    return np.random.default_rng([seed, task_number(task, purpose)])


def task_number(task: Task, purpose: str) -> int:
    """A number in [0, 2**32) that tells tasks and purposes apart."""
    return zlib.crc32(f"{purpose}/{task.split}/{task.task_id}".encode())
