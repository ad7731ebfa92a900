"""What evaluations measure, from a run's configuration: which prompts, as which tokens, with which settings."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from cft_jax.config import Config, DataConfig
from cft_jax.distributions import OutputSpace, Task, space_settings, spread
from cft_jax.distributions.analytic_space import AnalyticSpace
from cft_jax.distributions.splits import OOD, TRAIN, UNSEEN
from cft_jax.evaluate.suites.structured.plan import PromptCodec, Resolution
from cft_jax.evaluate.suites.structured.suite import StructuredSettings
from cft_jax.text import ChatOptions, Trie, build_trie, encode_chats, terminator_id
from cft_jax.text.analytic_trie import AnalyticTrie
from cft_jax.text.digits import digit_tokens
from cft_jax.text.number_grammar import NumberTokens
from cft_jax.text.tokenizer import fingerprint


def evaluation_tasks(config: Config, tasks: Mapping[str, Sequence[Task]]) -> list[Task]:
    """The prompts to measure: the two test splits, or the trained prompts where custom data has no others."""
    tested = [list(tasks[split]) for split in (UNSEEN, OOD) if tasks[split]] or [list(tasks[TRAIN])]
    limit = config.eval.max_prompts_per_split
    if limit:
        tested = [spread(members, limit, lambda task: task.group) for members in tested]
    return [task for members in tested for task in members]


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
