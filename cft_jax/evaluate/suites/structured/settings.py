"""What evaluations measure, from a run's configuration: which prompts, as which tokens, with which settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config, DataConfig
from cft_jax.distributions import OutputSpace, Task, space_settings, spread
from cft_jax.distributions.analytic_space import AnalyticSpace
from cft_jax.distributions.splits import TEST_SPLITS, TRAIN
from cft_jax.distributions.tasks import SpaceSettings
from cft_jax.text import ChatOptions, Trie, build_trie, encode_chats, terminator_id
from cft_jax.text.analytic_trie import AnalyticTrie
from cft_jax.text.digits import digit_tokens
from cft_jax.text.number_grammar import NumberTokens
from cft_jax.text.tokenizer import backend, fingerprint

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class PromptCodec:
    """How prompts and answers become tokens.

    Attributes:
      encode: messages → token ids of the prompt.
      build_trie: output space → trie, in the model's tokens with the trained terminator.
      analytic_trie: the same for a space at full resolution.
      text_of: the text of tokens, special ones as they are written.
      name: identifies all of them: part of a result's fingerprint.
    """

    encode: Callable[[Messages], list[int]]
    build_trie: Callable[[OutputSpace], Trie]
    analytic_trie: Callable[[AnalyticSpace], AnalyticTrie]
    text_of: Callable[[Sequence[int]], str]
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


@dataclass(frozen=True)
class StructuredSettings:
    """What is measured at a resolution: the other fields are those of `config.eval`."""

    resolution: Resolution
    num_samples: int
    seeds: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    numbers_per_completion: int


def evaluation_tasks(config: Config, tasks: Mapping[str, Sequence[Task]]) -> list[Task]:
    """The prompts to measure: the test splits, or the trained prompts where custom data has no others.

    Raises:
      UserError: there are none.
    """
    tested = [tasks[split] for split in TEST_SPLITS if tasks.get(split)] or [tasks[TRAIN]]
    limit = config.eval.max_prompts_per_split
    found = [task for members in tested for task in spread(members, limit or len(members), lambda task: task.group)]
    if not found:
        raise UserError("there are no prompts to evaluate; check config.data's families and the splits of custom tasks")
    return found


def structured_settings(config: Config) -> StructuredSettings:
    """What the structured suite measures: the values of training, sampled as `eval` says."""
    quantile = config.data.full_quantile if config.data.space == "full" else 0.0
    return StructuredSettings(
        Resolution(space_settings(config.data), quantile, config.train.epsilon_smoothing),
        num_samples=config.eval.num_samples,
        seeds=config.eval.seeds,
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        numbers_per_completion=config.eval.numbers_per_completion,
    )


def prompt_codec(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> PromptCodec:
    """How prompts and answers become tokens, as in training."""
    options, end = ChatOptions.from_config(data), terminator_id(tokenizer, data.terminator)
    return PromptCodec(
        encode=lambda messages: encode_chats(tokenizer, [messages], options)[0],
        build_trie=lambda space: build_trie(tokenizer, space, end),
        analytic_trie=lambda space: AnalyticTrie(space, NumberTokens(digit_tokens(tokenizer), end)),
        text_of=lambda tokens: backend(tokenizer).decode(list(tokens), skip_special_tokens=False),
        name=f"{fingerprint(tokenizer)} {options} {end}",
    )
