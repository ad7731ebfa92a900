"""The training data of a run, as its configuration asks for it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config, TrainConfig
from cft_jax.data.dataset import Dataset, Layout, Mixture, Source, common_prefix
from cft_jax.data.hard import DrawnStrings
from cft_jax.data.prepared import Prepared, check_lengths, encode_prompts, prepare
from cft_jax.data.soft import AnalyticPaths, AnalyticTries, DrawnPaths, Prompts, WholeTries
from cft_jax.data.spaces import SpaceTable, task_space
from cft_jax.distributions.tasks import Task
from cft_jax.text.chat import terminator_id
from cft_jax.text.values import ValueEncoder


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
      UserError: the counts do not divide, there are no tasks, or see `prepare`.
    """
    if not tasks:
        raise UserError("there is nothing to train on; give config.data.custom rows with split train, or families")
    train = config.train
    weights = np.array([task.weight for task in tasks], dtype=np.float64)
    weights /= weights.mean()
    if config.data.target == "hard":
        source, prompts = _hard_source(config, tokenizer, tasks, weights)
    else:
        prepared = prepare(tokenizer, tasks, config.data)
        source, prompts = _soft_source(config, prepared, weights), prepared.prompts
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
        # A trie's strings are drawn only at full resolution, below its most probable prefixes.
        return Layout(1, train.paths_per_prompt, train.batch_size, train.row_tokens, True, row_multiple)
    strings = 1 if train.objective == "path" else train.paths_per_prompt
    samples = train.samples_per_prompt_per_epoch
    if train.batch_size % strings:
        raise UserError(
            f"config.train.batch_size={train.batch_size} counts strings and is not divisible by "
            f"config.train.paths_per_prompt={strings}, the strings drawn at each visit of a prompt"
        )
    if samples > strings and samples % strings:
        raise UserError(
            f"config.train.samples_per_prompt_per_epoch={samples} is not divisible by "
            f"config.train.paths_per_prompt={strings}, the strings drawn at each visit of a prompt"
        )
    row_tokens = train.row_tokens if train.row_tokens > 0 else None
    return Layout(max(1, samples // strings), strings, train.batch_size // strings, row_tokens, False, row_multiple)


def _hard_source(
    config: Config, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], weights: np.ndarray
) -> tuple[Source, Prompts]:
    end = terminator_id(tokenizer, config.data.terminator)
    prompts = encode_prompts(tokenizer, tasks, config.data)
    encoder = ValueEncoder(tokenizer)
    spaces = SpaceTable(task_space(task, config.data) for task in tasks)
    depths = _longest_values(spaces, encoder, prompts, config.data.max_length)
    check_lengths(tasks, prompts, depths, config.data.max_length)
    return DrawnStrings(spaces, [task.task_id for task in tasks], prompts, weights, encoder, end), prompts


def _longest_values(
    spaces: SpaceTable, encoder: ValueEncoder, prompts: Sequence[Int32[np.ndarray, "_"]], max_length: int
) -> list[int]:
    """Tokens of each space's longest value; 0 where all are known to fit."""
    codes = [spaces.longest(task, max_length - prompt.size - 1) for task, prompt in enumerate(prompts)]
    owner = np.repeat(np.arange(len(prompts)), [code.size for code in codes])
    _, lengths = spaces.encode(encoder, owner, np.concatenate(codes))
    longest = np.zeros(len(prompts), dtype=np.int64)
    np.maximum.at(longest, owner, lengths)
    return longest.tolist()


def _soft_source(config: Config, prepared: Prepared, weights: np.ndarray) -> Source:
    per_position = config.train.weighting == "mean_over_steps"
    is_analytic = prepared.is_analytic
    sources: list[Source] = []
    for analytic in (False, True):
        mine = np.flatnonzero(is_analytic == analytic)
        if not mine.size:
            continue
        prompts = [prepared.prompts[task] for task in mine.tolist()]
        if config.train.objective == "exact":
            nodes = _node_budget(config, prepared)
            sources.append(
                AnalyticTries(prepared.analytic, prompts, weights[mine], per_position, nodes)
                if analytic
                else WholeTries(prepared.forest, prompts, weights[mine], per_position, nodes)
            )
        else:
            sources.append(
                AnalyticPaths(prepared.analytic, prompts, weights[mine], per_position)
                if analytic
                else DrawnPaths(prepared.forest, prompts, weights[mine], per_position)
            )
    return sources[0] if len(sources) == 1 else Mixture(sources, is_analytic.astype(np.int64))


def _node_budget(config: Config, prepared: Prepared) -> int:
    longest = int(prepared.depths.max())
    if config.train.exact_max_nodes <= longest:
        raise UserError(
            f"config.train.exact_max_nodes={config.train.exact_max_nodes} must be greater than {longest}, the tokens "
            "of the longest answer"
        )
    return config.train.exact_max_nodes
