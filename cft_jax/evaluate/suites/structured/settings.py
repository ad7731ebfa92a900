"""What evaluations measure, from a run's configuration: which prompts, as which tokens, with which settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config, DataConfig
from cft_jax.distributions import OutputSpace, Task, space_settings, spread
from cft_jax.distributions.analytic_space import AnalyticSpace
from cft_jax.distributions.splits import OOD, TRAIN, UNSEEN
from cft_jax.evaluate.suites.structured.plan import PromptCodec, Resolution
from cft_jax.text import ChatOptions, Trie, build_trie, encode_chats, terminator_id
from cft_jax.text.analytic_trie import AnalyticTrie
from cft_jax.text.digits import digit_tokens
from cft_jax.text.number_grammar import NumberTokens
from cft_jax.text.tokenizer import fingerprint


@dataclass(frozen=True)
class StructuredSettings:
    """What is measured.

    Attributes:
      resolution: the values whose probabilities are compared.
      num_samples: answers per prompt and seed; 0 samples nothing.
      seeds: one set of samples for each.
      max_new_tokens: per answer.
      temperature, top_p: of the samples.
      numbers_per_completion: 1 for the protocol `independent`; more for `batch`, where each completion holds so many
        comma-separated numbers and nothing but samples is measured.
    """

    resolution: Resolution
    num_samples: int
    seeds: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    numbers_per_completion: int


def evaluation_tasks(config: Config, tasks: Mapping[str, Sequence[Task]]) -> list[Task]:
    """The prompts to measure: the two test splits, or the trained prompts where custom data has no others.

    Raises:
      UserError: there are none.
    """
    tested = [list(tasks[split]) for split in (UNSEEN, OOD) if tasks[split]] or [list(tasks[TRAIN])]
    limit = config.eval.max_prompts_per_split
    if limit:
        tested = [spread(members, limit, lambda task: task.group) for members in tested]
    found = [task for members in tested for task in members]
    if not found:
        raise UserError("there are no prompts to evaluate; check config.data's families and the splits of custom tasks")
    return found


def structured_settings(config: Config) -> StructuredSettings:
    """What the structured suite measures: the values of training, sampled as `eval` says."""
    return StructuredSettings(
        resolution=Resolution(
            grid=space_settings(config.data),
            full_quantile=config.data.full_quantile if config.data.space == "full" else 0.0,
            epsilon=config.train.epsilon_smoothing,
        ),
        num_samples=config.eval.num_samples,
        seeds=config.eval.seeds,
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        numbers_per_completion=config.eval.numbers_per_completion,
    )


def prompt_codec(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> PromptCodec:
    """How prompts and answers become tokens, as in training."""
    options = ChatOptions.from_config(data)
    end = terminator_id(tokenizer, data.terminator)

    def listed(space: OutputSpace) -> Trie:
        return build_trie(tokenizer, space, end)

    def full(space: AnalyticSpace) -> AnalyticTrie:
        return AnalyticTrie(space, NumberTokens(digit_tokens(tokenizer), end))

    return PromptCodec(
        encode=lambda messages: encode_chats(tokenizer, [messages], options)[0],
        build_trie=listed,
        analytic_trie=full,
        name=f"{fingerprint(tokenizer)} {options} {end}",
    )
