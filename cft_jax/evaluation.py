"""The main job's evaluations: which prompts, with which settings, into which directories."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config, DataConfig
from cft_jax.distributions import OutputSpace, Task, space_settings, spread
from cft_jax.distributions.full_space import FullSpace
from cft_jax.distributions.splits import OOD, TRAIN, UNSEEN
from cft_jax.evaluate.exact_plan import PromptCodec, Resolution
from cft_jax.evaluate.jax_backend import JaxBackend
from cft_jax.evaluate.structured import SUITE, StructuredSettings, run_structured
from cft_jax.models.transformer import Transformer
from cft_jax.text import ChatOptions, Trie, build_trie, encode_chats, terminator_id
from cft_jax.text.digits import digit_tokens
from cft_jax.text.full_trie import FullTrie
from cft_jax.text.number_prefixes import NumberTokens
from cft_jax.text.tokenizer import fingerprint

STAGES = ("before", "after")


def evaluation_tasks(config: Config, tasks: Mapping[str, Sequence[Task]]) -> list[Task]:
    """The prompts to measure: the two test splits, or the trained prompts where custom data has no others."""
    tested = [list(tasks[split]) for split in (UNSEEN, OOD) if tasks[split]] or [list(tasks[TRAIN])]
    limit = config.eval.max_prompts_per_split
    if limit:
        tested = [spread(members, limit, lambda task: task.group) for members in tested]
    return [task for members in tested for task in members]


def evaluate_stage(
    config: Config,
    model: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Task]],
    workdir: Path,
    *,
    stage: str,
    checkpoint: str,
) -> dict[str, Any]:
    """Runs the configured suites on the model, into `eval/<suite>/<stage>`; a killed one goes on where it stopped.

    Args:
      config: of the run.
      model: as it is at this stage; it must not change meanwhile.
      tokenizer: of the model.
      tasks: by split.
      workdir: of the run.
      stage: "before" or "after".
      checkpoint: name of what is measured.

    Returns:
      The summaries by suite.
    """
    directory = workdir / "eval" / SUITE / stage
    logging.info(
        "evaluating %s training, %s samples a prompt, into %s", stage, f"{config.eval.num_samples:,}", directory
    )
    summary = run_structured(
        JaxBackend(model, tokenizer),
        prompt_codec(tokenizer, config.data),
        evaluation_tasks(config, tasks),
        structured_settings(config),
        directory,
        checkpoint=checkpoint,
        write=jax.process_index() == 0,
    )
    return {SUITE: summary}


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

    def full(space: FullSpace) -> FullTrie:
        return FullTrie(space, NumberTokens(digit_tokens(tokenizer), end))

    return PromptCodec(
        encode=lambda messages: encode_chats(tokenizer, [messages], options)[0],
        build_trie=listed,
        full_trie=full,
        name=f"{fingerprint(tokenizer)} {options} {end}",
    )


def check_suites(config: Config) -> None:
    """Refuses suites that the main job cannot run.

    Raises:
      UserError: naming them.
    """
    other = [name for name in config.eval.suites if name != SUITE]
    if other:
        raise UserError(f"config.eval.suites has {', '.join(other)}; the main job runs {SUITE}")
