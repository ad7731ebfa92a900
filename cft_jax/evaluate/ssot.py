"""String Seed of Thought (arXiv 2510.21150): the model writes a random string first and derives its answer from it.

The prompts are in our own words; answers are read by the paper's rules, in its order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from cft_jax.distributions import strip_thinking

Mode = Literal["numeric", "open"]
Reasoning = Literal["none", "tags", "channels"]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_OPEN_ANSWER = re.compile(r"<answer>(.*)", re.IGNORECASE | re.DOTALL)
_BLOCK = re.compile(r"<(random_string|thinking)>.*?</\1>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?\w+>")
# What remains of channels once their special tokens are left out: the next turn's role and channel, in one word.
_CHANNEL_ANSWER_TAG = re.compile(r"assistantanswer>", re.IGNORECASE)
_CHANNEL_GLUE = re.compile(r"assistant(?:final|commentary)\s*(?=<)", re.IGNORECASE)
_CHANNEL_ANSWER = re.compile(r"assistant(?:answer|final)\s*([^\s<][^\n<]*)", re.IGNORECASE)


@dataclass(frozen=True)
class ReadAnswer:
    """The answer in a completion; `degraded` where it did not stand in a closed `<answer>`."""

    text: str
    degraded: bool


def native_reasoning(chat_template: str) -> Reasoning:
    """How a model with this chat template reasons before it answers.

    By "channels" (gpt-oss: a turn for the reasoning, one for the answer), by "tags" (Qwen3: `<think>`, which the
    template can switch on) or not at all, "none".
    """
    if "<|channel|>" in chat_template:
        return "channels"
    return "tags" if "enable_thinking" in chat_template else "none"


def seeded_messages(messages: Sequence[Mapping[str, str]], mode: Mode, reasoning: Reasoning) -> list[dict[str, str]]:
    """The conversation behind the method's instructions: a system message, the developer's with channels."""
    channels = reasoning == "channels"
    name = f"ssot_{mode}{'_channels' if channels else ''}.txt"
    text = resources.files("cft_jax.evaluate").joinpath("prompts", name).read_text(encoding="utf-8").strip()
    return [{"role": "developer" if channels else "system", "content": text}, *map(dict, messages)]


def clean_response(text: str, reasoning: Reasoning) -> str:
    """A completion without a native thinking trace, where the model writes one as tags, and without outer spaces."""
    return strip_thinking(text) if reasoning == "tags" else text.strip()


def extract_answer(text: str, reasoning: Reasoning, *, strict: bool) -> ReadAnswer:
    """The answer in a cleaned completion, by the paper's rules.

    The first closed `<answer>` counts, wherever it stands. Without one: what follows an open tag (not if strict); with
    channels, what follows the glued name of the answer's channel, or a bare line; then, if strict, nothing; else the
    last line without the method's blocks and tags.
    """
    channels = reasoning == "channels"
    if channels:
        text = _CHANNEL_GLUE.sub("", _CHANNEL_ANSWER_TAG.sub("<answer>", text))
    if found := _ANSWER.search(text):
        return ReadAnswer(found[1].strip(), False)
    if not strict and (found := _OPEN_ANSWER.search(text)):
        return ReadAnswer(found[1].strip(), True)
    if channels and (answer := _channel_answer(text)):
        return ReadAnswer(answer, True)
    return ReadAnswer("" if strict else _last_line(text), True)


def _channel_answer(text: str) -> str:
    if found := _CHANNEL_ANSWER.search(text):
        return found[1].strip()
    bare = text.strip()
    return "" if "\n" in bare or "<" in bare or "assistant" in bare.lower() else bare


def _last_line(text: str) -> str:
    lines = [line.strip() for line in _TAG.sub("", _BLOCK.sub("", text)).splitlines()]
    return next((line for line in reversed(lines) if line), text.strip())
