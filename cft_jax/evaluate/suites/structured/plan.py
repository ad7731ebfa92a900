"""What to ask the model about one prompt for its exact metrics, and the metrics from its answers."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from cft_jax.common.errors import UserError
from cft_jax.distributions.analytic_space import AnalyticSpace, analytic_space
from cft_jax.distributions.output_space import OutputSpace
from cft_jax.distributions.tasks import SpaceSettings, Task
from cft_jax.evaluate.metrics import paths
from cft_jax.evaluate.metrics.target import FamilyTarget
from cft_jax.evaluate.suites.structured import prompt_metrics
from cft_jax.evaluate.suites.structured.analytic_metrics import cell_sections
from cft_jax.generate import TrieScore
from cft_jax.text.analytic_trie import AnalyticTrie, Expansion
from cft_jax.text.trie import Trie

# The paper scores its path KL at 2 decimals, whatever the training resolution, on 4 strings per prompt.
PAPER_PATH_DECIMALS = 2
PAPER_PATH_DRAWS = 4
# A full-resolution space of up to so many strings is listed; of a larger one so many of the most probable prefixes are
# scored, and for what lies below them so many drawn strings.
MAX_LISTED = 4096
MAX_PREFIXES = 1024
DRAWN_STRINGS = 64

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class PromptCodec:
    """How a suite turns messages and answers into tokens.

    Attributes:
      encode: messages → token ids of the prompt.
      build_trie: output space → trie, in the model's tokens with the trained terminator.
      analytic_trie: the same for a space at full resolution.
      name: identifies all of them: part of a result's fingerprint.
    """

    encode: Callable[[Messages], list[int]]
    build_trie: Callable[[OutputSpace], Trie]
    analytic_trie: Callable[[AnalyticSpace], AnalyticTrie]
    name: str


@dataclass(frozen=True)
class Resolution:
    """The values whose probabilities are compared: as in training.

    Attributes:
      grid: how the paper's grid discretises the families.
      full_quantile: 0 for the grid; else every string of the grid's decimals counts, and an unbounded support is cut
        at this quantile.
      epsilon: floor of the targets in the path KL.
    """

    grid: SpaceSettings
    full_quantile: float
    epsilon: float


@dataclass(frozen=True, eq=False)
class PaperPath:
    """The paper's path KL: a few drawn strings at the paper's resolution."""

    trie: Trie
    draws: Int[np.ndarray, "S"]
    epsilon: float

    @classmethod
    def of(cls, task: Task, codec: PromptCodec, resolution: Resolution, seed: int) -> "PaperPath | None":
        """The draws depend on the seed and the task alone; None where only an analytic space holds the family."""
        try:
            space = task.output_space(replace(resolution.grid, num_decimals=PAPER_PATH_DECIMALS))
        except UserError:
            if not resolution.full_quantile:
                raise
            return None
        draws = prompt_metrics.path_draws(space, PAPER_PATH_DRAWS, task_rng(task, seed, "path"))
        return cls(codec.build_trie(space), draws, resolution.epsilon)

    @property
    def prefixes(self) -> Int[np.ndarray, "R"]:
        """The prefixes that must be scored."""
        return paths.path_prefixes(self.trie, self.draws)

    def logit_kl(self, score: TrieScore) -> float:
        """The metric, in nats."""
        return prompt_metrics.mean_path_kl(self.trie, score, self.draws, self.epsilon)


@dataclass(frozen=True, eq=False)
class ListedPlan:
    """Exact metrics over listed values; the model must score the whole of `trie`."""

    task: Task
    space: OutputSpace
    trie: Trie
    resolution: Resolution

    def sections(self, score: TrieScore, *, keep_distribution: bool) -> prompt_metrics.Metrics:
        """The sections of the prompt's record; with `distribution`, what plots need, where it is to be kept."""
        target = prompt_metrics.target_of_task(self.task, self.resolution.grid.num_decimals)
        sections = prompt_metrics.exact_section(self.space, score, target)
        expected = prompt_metrics.expected_path_kl(self.space, self.trie, score, self.resolution.epsilon)
        sections["path"] = prompt_metrics.finite({"logit_kl_as_trained": expected})
        if keep_distribution:
            sections["distribution"] = prompt_metrics.distribution_section(self.task, self.space, score)
        return sections


@dataclass(frozen=True, eq=False)
class AnalyticPlan:
    """Metrics of a space at full resolution; the model must score the whole of `trie`, the most probable prefixes."""

    task: Task
    full: AnalyticTrie
    expansion: Expansion
    resolution: Resolution

    @property
    def trie(self) -> Trie:
        return self.expansion.trie

    def sections(self, score: TrieScore, *, keep_distribution: bool) -> prompt_metrics.Metrics:
        """As `ListedPlan.sections`."""
        assert self.task.spec is not None
        target = FamilyTarget(self.task.spec.family_id, self.task.spec.parameters, self.full.space.num_decimals)
        sections = cell_sections(self.full, self.expansion, score, target, self.resolution.epsilon)
        distribution = sections.pop("distribution")
        if keep_distribution:
            sections["distribution"] = prompt_metrics.named(self.task) | distribution
        return sections


def plan_of(task: Task, codec: PromptCodec, resolution: Resolution, seed: int) -> ListedPlan | AnalyticPlan:
    """The plan of a task; what is drawn depends on the seed and the task alone."""
    if task.spec is None or not resolution.full_quantile:
        space = task.output_space(resolution.grid)
        return ListedPlan(task, space, codec.build_trie(space), resolution)
    full = analytic_space(task.spec, num_decimals=resolution.grid.num_decimals, quantile=resolution.full_quantile)
    if full.num_values <= MAX_LISTED:
        integers = np.arange(full.first, full.last + 1)
        space = OutputSpace(tuple(full.strings(integers)), full.interval_masses(integers, integers + 1))
        return ListedPlan(task, space, codec.build_trie(space), resolution)
    trie = codec.analytic_trie(full)
    drawn = full.draw(task_rng(task, seed, "full").random(DRAWN_STRINGS))
    return AnalyticPlan(task, trie, trie.expand(MAX_PREFIXES, _longest(trie), drawn), resolution)


def task_rng(task: Task, seed: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on the seed, the task and what they are for, and on nothing else."""
    return np.random.default_rng([seed, task_number(task, purpose)])


def task_number(task: Task, purpose: str) -> int:
    """A number in [0, 2**32) that tells tasks and purposes apart."""
    return zlib.crc32(f"{purpose}/{task.split}/{task.task_id}".encode())


def _longest(trie: AnalyticTrie) -> int:
    """Tokens of the longest string: one of the two ends."""
    return int(trie.encode(np.array([trie.space.first, trie.space.last]))[1].max())
