"""What a train step sees: the one place where `train.objective` and `data.target` choose it.

| choice | examples of a visit of a prompt |
|---|---|
| `path` | one drawn string; at each of its prefixes the trie's distribution of the next token (`Paths`) |
| `paths` | several drawn strings in one tree, each prefix once (`Paths`) |
| `exact` | every prefix of the trie, weighted by how often strings pass it (`WholeTries`) |
| hard targets | the drawn strings of `path` or `paths`, at each prefix their own next tokens (`DrawnStrings`) |

Tries of listed values and analytic ones (`data.space=full`) have a class of their own for each.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int32, Int64
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config, TrainConfig
from cft_jax.data.dataset import Dataset, Layout, Source, common_prefix
from cft_jax.data.examples import (
    TrieExamples,
    examples_of_strings,
    examples_of_tries,
    joined_examples,
    split_examples,
)
from cft_jax.data.prepared import Prepared, check_lengths, encode_prompts, prepare
from cft_jax.data.spaces import SpaceTable, draw_indices, task_space, warn_of_lost_mass
from cft_jax.distributions.tasks import Task
from cft_jax.text.analytic_trie import AnalyticTrie, drawn_forest
from cft_jax.text.chat import terminator_id
from cft_jax.text.trie import Forest, grow_forest
from cft_jax.text.values import ValueEncoder, check_values

Prompts = Sequence[Int32[np.ndarray, "_"]]

# Deeper than any number: a sign, a point and 18 digits.
_ANY_DEPTH = 32


def training_dataset(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    row_multiple: int,
    share_prefix: bool,
) -> Dataset:
    """The batches of a run.

    `path` and hard targets visit a prompt `samples_per_prompt_per_epoch` times an epoch, each time with one drawn
    string; `paths` puts `paths_per_prompt` of an epoch's strings of a prompt into each visit (hard targets too), and
    at least draws that many; `exact` visits every prompt once. `exact`, and everything with `row_tokens`, packs
    several prompts into a row.

    Args:
      config: a checked configuration.
      tokenizer: of the model.
      tasks: the training split.
      row_multiple: batches have a multiple of so many rows; the rows beyond the data are padding.
      share_prefix: whether batches leave out the tokens that all prompts begin with (`Dataset.shared_prefix`).

    Raises:
      UserError: the counts do not divide, there are no tasks, or see `prepare` and `check_values`.
    """
    if not tasks:
        raise UserError("there is nothing to train on; give config.data.custom rows with split train, or families")
    check_values(tokenizer, tasks)
    train = config.train
    weights = np.array([task.weight for task in tasks], dtype=np.float64)
    weights /= weights.mean()
    if config.data.target == "hard":
        source, prompts = _hard_source(config, tokenizer, tasks, weights)
        lost_mass = source.spaces.lost_mass
    else:
        prepared = prepare(tokenizer, tasks, config.data)
        source, prompts, lost_mass = _soft_source(config, prepared, weights), prepared.prompts, prepared.lost_mass
    warn_of_lost_mass(tasks, lost_mass)
    return Dataset(
        source,
        _layout(train, row_multiple),
        shared_prefix=common_prefix(prompts) if share_prefix else np.zeros(0, dtype=np.int32),
        groups=[task.group for task in tasks],
        names=[task.task_id for task in tasks],
        seed=config.seed,
        epsilon=None if config.data.target == "hard" else train.epsilon_smoothing,
    )


def _layout(train: TrainConfig, row_multiple: int) -> Layout:
    if train.objective == "exact":
        # A trie's strings are drawn only below the most probable prefixes of an analytic one.
        return Layout(1, train.paths_per_prompt, train.batch_size, train.row_tokens, True, row_multiple)
    strings = 1 if train.objective == "path" else train.paths_per_prompt
    samples = train.samples_per_prompt_per_epoch
    for name, count in (("batch_size", train.batch_size), ("samples_per_prompt_per_epoch", max(samples, strings))):
        if count % strings:
            counts = " counts strings and" if name == "batch_size" else ""
            raise UserError(
                f"config.train.{name}={count}{counts} is not divisible by config.train.paths_per_prompt={strings}, "
                "the strings drawn at each visit of a prompt"
            )
    row_tokens = train.row_tokens if train.row_tokens > 0 else None
    return Layout(max(1, samples // strings), strings, train.batch_size // strings, row_tokens, False, row_multiple)


def _soft_source(config: Config, prepared: Prepared, weights: np.ndarray) -> Source:
    per_position = config.train.weighting == "mean_over_steps"
    exact = config.train.objective == "exact"
    max_nodes = config.train.exact_max_nodes
    if exact and max_nodes <= prepared.depths.max():
        raise UserError(
            f"config.train.exact_max_nodes={max_nodes} must be greater than {prepared.depths.max()}, the tokens of "
            "the longest answer"
        )
    sources: list[Source] = []
    for is_analytic in np.unique(prepared.is_analytic):
        mine = np.flatnonzero(prepared.is_analytic == is_analytic)
        common = [prepared.prompts[task] for task in mine.tolist()], weights[mine], per_position
        if is_analytic:
            tries = prepared.analytic
            sources.append(AnalyticTries(*common, tries, max_nodes) if exact else AnalyticPaths(*common, tries))
        else:
            tries = prepared.forest
            sources.append(WholeTries(*common, tries, max_nodes) if exact else Paths(*common, tries))
    return sources[0] if len(sources) == 1 else Mixture(sources, prepared.is_analytic.astype(np.int64))


def _hard_source(
    config: Config, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], weights: np.ndarray
) -> tuple["DrawnStrings", Prompts]:
    end = terminator_id(tokenizer, config.data.terminator)
    prompts = encode_prompts(tokenizer, tasks, config.data)
    encoder = ValueEncoder(tokenizer)
    spaces = SpaceTable(task_space(task, config.data) for task in tasks)
    # Values that may be too long to fit behind their prompt.
    codes = [spaces.longest(task, config.data.max_length - prompt.size - 1) for task, prompt in enumerate(prompts)]
    owner = np.repeat(np.arange(len(prompts)), [code.size for code in codes])
    depths = np.zeros(len(prompts), dtype=np.int64)
    np.maximum.at(depths, owner, spaces.encode(encoder, owner, np.concatenate(codes))[1])
    check_lengths(tasks, prompts, depths.tolist(), config.data.max_length)
    return DrawnStrings(prompts, weights, spaces, [task.task_id for task in tasks], encoder, end), prompts


@dataclass(frozen=True, eq=False)
class _SoftTargets:
    """Tasks of which a step sees the trie's distributions.

    Attributes:
      prompts: of every task.
      task_weights: what a string of each task weighs; 1 on average.
      per_position: whether a string's weight is divided among its target positions or given to each.
    """

    prompts: Prompts
    task_weights: Float64[np.ndarray, "G"]
    per_position: bool

    def _of_drawn(
        self,
        tasks: Int64[np.ndarray, "B"],
        forest: Forest,
        tries: Int64[np.ndarray, "B"],
        strings: Int64[np.ndarray, "B M"],
    ) -> TrieExamples:
        count, per_example = strings.shape
        return examples_of_strings(
            forest,
            [self.prompts[task] for task in tasks.tolist()],
            tries,
            np.repeat(np.arange(count), per_example),
            strings.ravel(),
            np.repeat(self.task_weights[tasks], per_example),
            np.full(count, float(per_example)),
            per_position=self.per_position,
        )


@dataclass(frozen=True, eq=False)
class Paths(_SoftTargets):
    """Strings drawn from listed spaces (`path`, `paths`); `forest` has the trie of every task."""

    forest: Forest

    def examples(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """An example per task with as many drawn strings as there are uniform numbers."""
        drawn = [draw_indices(self._cumulative[task], row) for task, row in zip(tasks.tolist(), uniforms, strict=True)]
        return self._of_drawn(tasks, self.forest, tasks, np.stack(drawn))

    @cached_property
    def _cumulative(self) -> list[np.ndarray]:
        probabilities, starts = self.forest.arrays["leaf_probs"], self.forest.leaf_starts
        return [np.cumsum(probabilities[a:b]) for a, b in itertools.pairwise(starts)]


@dataclass(frozen=True, eq=False)
class AnalyticPaths(_SoftTargets):
    """Strings drawn from analytic tries (`path`, `paths`); every prefix on their way has all its children."""

    tries: Sequence[AnalyticTrie]

    def examples(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """An example per task with as many drawn strings as there are uniform numbers."""
        tries = [self.tries[task] for task in tasks.tolist()]
        drawn = [trie.space.draw(row) for trie, row in zip(tries, uniforms, strict=True)]
        strings = np.broadcast_to(np.arange(uniforms.shape[1]), uniforms.shape)
        return self._of_drawn(tasks, drawn_forest(tries, drawn), np.arange(tasks.size), strings)


@dataclass(frozen=True, eq=False)
class WholeTries(_SoftTargets):
    """All strings of listed spaces with their probabilities (`exact`).

    Attributes:
      forest: the trie of every task.
      max_nodes: prefixes in one example; longer tries become several.
    """

    forest: Forest
    max_nodes: int

    def examples(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """At least an example per task; the uniform numbers are not needed."""
        starts = self.forest.leaf_starts
        leaves = [self.forest.arrays["leaf_probs"][starts[task] : starts[task + 1]] for task in tasks]
        strings = [np.flatnonzero(probabilities) for probabilities in leaves]
        owner = np.repeat(np.arange(tasks.size), [chosen.size for chosen in strings])
        probabilities = np.concatenate([leaf[chosen] for leaf, chosen in zip(leaves, strings, strict=True)])
        examples = examples_of_strings(
            self.forest,
            [self.prompts[task] for task in tasks.tolist()],
            tasks,
            owner,
            np.concatenate(strings),
            probabilities * self.task_weights[tasks][owner],
            np.ones(tasks.size),
            per_position=self.per_position,
        )
        return split_examples(examples, self.max_nodes)


@dataclass(frozen=True, eq=False)
class AnalyticTries(_SoftTargets):
    """The most probable prefixes of analytic tries, and below them drawn strings without bias (`exact`).

    Attributes:
      tries: of every task.
      max_nodes: prefixes in one example, and how many of the most probable prefixes are taken.
    """

    tries: Sequence[AnalyticTrie]
    max_nodes: int

    def examples(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """At least an example per task, with a drawn string per uniform number."""
        tries, weights = [], []
        for task, row in zip(tasks.tolist(), uniforms, strict=True):
            trie = self.tries[task]
            part = trie.expand(self.max_nodes, _ANY_DEPTH, trie.space.draw(row))
            tries.append(part.trie)
            of_positions = part.mean_weights if self.per_position else part.sequence_weights
            weights.append(of_positions * self.task_weights[task])
        prompts = [self.prompts[task] for task in tasks.tolist()]
        return split_examples(examples_of_tries(tries, prompts, weights, np.ones(tasks.size)), self.max_nodes)


@dataclass(frozen=True, eq=False)
class DrawnStrings:
    """Strings drawn from any spaces, scored by the cross-entropy of their own tokens (hard targets).

    Only what is drawn is written and tokenised. An example with several strings holds their common prefixes once. Its
    target at a prefix is then the empirical distribution of the next token, and the target position weighs as many
    strings as pass, which gives the same sum.

    Attributes:
      prompts: of every task.
      task_weights: what a string of each task weighs; 1 on average.
      spaces: of every task.
      names: of every task, for errors.
      encoder: of the tokenizer.
      terminator_id: the token that ends every value.
    """

    prompts: Prompts
    task_weights: Float64[np.ndarray, "G"]
    spaces: SpaceTable
    names: Sequence[str]
    encoder: ValueEncoder
    terminator_id: int

    def examples(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """An example per task with as many drawn strings as there are uniform numbers.

        Raises:
          UserError: two drawn values of a task have the same tokens, or one contains the terminator.
        """
        drawn = np.sort(self.spaces.draw(tasks, uniforms), axis=1)
        is_new = np.ones(drawn.shape, dtype=bool)
        is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        distinct = np.flatnonzero(is_new)
        counts = np.diff(np.append(distinct, drawn.size)).astype(np.float64)
        owner, codes = distinct // drawn.shape[1], drawn.ravel()[distinct]
        tokens, lengths = self.spaces.encode(self.encoder, tasks[owner], codes)

        def describe(index: int) -> str:
            task, code = int(tasks[owner[index]]), int(codes[index])
            return f"task {self.names[task]}: value {self.spaces.write(task, code)!r}"

        forest = grow_forest(
            tokens,
            lengths,
            owner,
            counts / drawn.shape[1],
            terminator_id=self.terminator_id,
            describe=describe,
        )
        return examples_of_strings(
            forest,
            [self.prompts[task] for task in tasks.tolist()],
            np.arange(tasks.size),
            owner,
            np.arange(owner.size) - forest.leaf_starts[owner],
            counts * self.task_weights[tasks][owner],
            np.bincount(owner, weights=counts * (lengths + 1), minlength=tasks.size),
            per_position=False,
        )


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

    def examples(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """Examples of these tasks, in their order."""
        parts, numbers = [], []
        for index, source in enumerate(self._sources):
            mine = np.flatnonzero(self._source_of[tasks] == index)
            if mine.size:
                parts.append(source.examples(self._number[tasks[mine]], uniforms[mine]))
                numbers.append(mine)
        return parts[0] if len(parts) == 1 else joined_examples(parts, numbers)
