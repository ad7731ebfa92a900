"""How sampled suites ask a model and read what it writes."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.ssot import Mode, ReadAnswer, clean_response, extract_answer, native_reasoning, seeded_messages
from cft_jax.text import ChatOptions, encode_chats
from cft_jax.text.tokenizer import fingerprint

Messages = Sequence[Mapping[str, str]]
_LARGEST_SEED = 2**31


@dataclass(frozen=True)
class PromptStrategy:
    """A way to ask: "direct" or "ssot"; `encode` makes token ids of messages, `read` finds the answer in a completion.

    `name` identifies all the rest: part of a result's fingerprint.
    """

    method: str
    encode: Callable[[Messages], list[int]]
    read: Callable[[str], ReadAnswer]
    max_new_tokens: int
    name: str


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn: `num_samples` for each of the `seeds`."""

    num_samples: int
    seeds: tuple[int, ...]
    temperature: float
    top_p: float


def prompt_strategy(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, mode: Mode, max_new_tokens: int
) -> PromptStrategy:
    """The way that `eval.method` names, for a kind of answer.

    `max_new_tokens` is that of a direct answer; String Seed of Thought takes more, `suite.ssot.max_new_tokens`.
    """
    options = ChatOptions.from_config(config.data)
    tokens = fingerprint(tokenizer)
    if config.eval.method == "direct":
        return PromptStrategy(
            "direct",
            lambda messages: encode_chats(tokenizer, [messages], options)[0],
            lambda text: ReadAnswer(text, False),
            max_new_tokens,
            f"direct {tokens} {options} {max_new_tokens}",
        )
    ssot = config.suite.ssot
    reasoning = native_reasoning(tokenizer.get_chat_template() if tokenizer.chat_template is not None else "")
    thinking = ssot.thinking == "on" or (ssot.thinking == "auto" and reasoning != "none")
    options = replace(options, enable_thinking=thinking)
    seeded = seeded_messages([], mode, reasoning)
    return PromptStrategy(
        "ssot",
        lambda messages: encode_chats(tokenizer, [[*seeded, *messages]], options)[0],
        lambda text: extract_answer(clean_response(text, reasoning), reasoning, strict=ssot.strict),
        ssot.max_new_tokens,
        f"ssot {tokens} {options} {ssot.max_new_tokens} {ssot.strict} {seeded}",
    )


def prompt_text(path: str, default: str, *, field: str) -> str:
    """The text of a user's file; of the package's own, `default`, for an empty path.

    Raises:
      UserError: the file cannot be read; `field` named it.
    """
    if not path:
        return resources.files("cft_jax.evaluate").joinpath("prompts", default).read_text(encoding="utf-8")
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config.{field}={path} cannot be read ({error}); name another file, "
            "or leave it empty for the package's own"
        ) from None


def draw(
    backend: Backend,
    strategy: PromptStrategy,
    sampling: SamplingConfig,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
) -> list[dict[str, list[str]]]:
    """Completions of every prompt, by seed: a name and a seed give the same draws, whatever else is drawn with them."""
    found: list[dict[str, list[str]]] = [{} for _ in prompts]
    for seed in sampling.seeds:
        texts = backend.sample(
            prompts,
            seeds=[(seed + zlib.crc32(f"sample/{name}".encode())) % _LARGEST_SEED for name in names],
            num_samples=sampling.num_samples,
            max_new_tokens=strategy.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        for own, drawn in zip(found, texts, strict=True):
            own[str(seed)] = drawn
    return found


def settings_of(strategy: PromptStrategy, sampling: SamplingConfig) -> dict[str, Any]:
    """Both, as a summary records them."""
    return {"method": strategy.method, "max_new_tokens": strategy.max_new_tokens, **asdict(sampling)}


def sampling_config(config: Config, num_samples: int) -> SamplingConfig:
    """The settings of `config.eval`; a suite's own number of samples counts where it is not 0.

    Raises:
      UserError: both are 0.
    """
    number = num_samples or config.eval.num_samples
    if not number:
        raise UserError("config.eval.num_samples=0 leaves nothing to measure; set it to at least 1")
    return SamplingConfig(number, config.eval.seeds, config.eval.temperature, config.eval.top_p)
