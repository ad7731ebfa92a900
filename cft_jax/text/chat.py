"""From messages to token ids by a tokenizer's own chat template: BOS, date, prefix and terminator are decided here."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import DataConfig
from cft_jax.text.tokenizer import backend

Messages = Sequence[Mapping[str, str]]

_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_ANY_DATE_CALL = re.compile(r"strftime_now\s*\(")
# Llama 3.1's template asks for no date in a format of its choice; it prints `date_string` as it comes.
_DATE_STRING_FORMAT = "%d %b %Y"
_MONTHS = "January February March April May June July August September October November December".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# Stands for the answer where a template is asked how it frames one; no template trims or rewrites it.
_ANSWER = "ANSWER7f3a"
_QUESTION = {"role": "user", "content": "0"}


@dataclass(frozen=True)
class ChatOptions:
    """How messages become a prompt; a template that has no such option ignores it.

    Attributes:
      enable_thinking: leave room for a reasoning trace (Qwen3, gpt-oss); off, the answer comes at once.
      reasoning_effort: "low", "medium" or "high" (gpt-oss).
      generation_prefix: text after the template's generation prompt, as the beginning of the answer's turn. "auto"
        is what the template itself writes between the two: `<|channel|>final<|message|>` for gpt-oss, nothing for
        Llama, Qwen3 and Gemma; nothing with `enable_thinking`.
      date: the date of templates that print one (Llama, gpt-oss), in ISO form.
      duplicate_bos: tokenise the rendered text with special tokens added once more, as the paper did (two BOS for
        Llama and Gemma).
    """

    enable_thinking: bool = False
    reasoning_effort: str = "low"
    generation_prefix: str = "auto"
    date: str = "2024-07-26"
    duplicate_bos: bool = False

    @classmethod
    def from_config(cls, data: DataConfig) -> "ChatOptions":
        """The options of a run's configuration."""
        return cls(
            enable_thinking=data.chat.enable_thinking,
            reasoning_effort=data.chat.reasoning_effort,
            generation_prefix=data.chat.generation_prefix,
            date=data.chat.date,
            duplicate_bos=data.duplicate_bos,
        )


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> list[int]:
    """Token ids of `messages` with the generation prompt at the end.

    Args:
      tokenizer: a tokenizer with a chat template.
      messages: records with "role" and "content".
      **options: the fields of `ChatOptions`.

    Raises:
      UserError: there is no chat template, or it refuses the messages or reads the date in an unknown way.
    """
    return encode_chats(tokenizer, [messages], ChatOptions(**options))[0]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: ChatOptions
) -> list[list[int]]:
    """`encode_chat` for many conversations at once."""
    texts = render_chats(tokenizer, conversations, options)
    if not texts:
        return []
    # Templates write the BOS themselves; adding special tokens here is what doubles it.
    encoded = tokenizer(texts, add_special_tokens=options.duplicate_bos, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]  # type: ignore[union-attr]


def render_chats(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: ChatOptions
) -> list[str]:
    """The conversations as text, with the generation prompt and prefix at the end."""
    template = _Template.of(tokenizer, options)
    prefix = _generation_prefix(template, options)
    return [template.render(messages, generation_prompt=True) + prefix for messages in conversations]


def terminator_id(tokenizer: PreTrainedTokenizerBase, which: str) -> int:
    """The token that ends an answer.

    Args:
      tokenizer: the tokenizer.
      which: "auto", the token that the chat template writes after an assistant's turn (for gpt-oss `<|return|>`);
        "tokenizer_eos", the one that the tokenizer names as its end of sequence; or a token such as "<|im_end|>".

    Raises:
      UserError: there is no such token.
    """
    if which == "auto":
        return _template_terminator(tokenizer)
    if which == "tokenizer_eos":
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer names no end-of-sequence token; set config.data.terminator to one of its tokens"
            )
        return int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    found = backend(tokenizer).token_to_id(which)
    if found is None:
        raise UserError(
            f"config.data.terminator={which!r} is no token of this tokenizer; "
            "it takes auto, tokenizer_eos or a token written exactly as in the vocabulary"
        )
    return found


def _template_terminator(tokenizer: PreTrainedTokenizerBase) -> int:
    _, after = _Template.of(tokenizer, ChatOptions()).around_answer()
    ids = backend(tokenizer).encode(after.lstrip(), add_special_tokens=False).ids
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    if not ids or ids[0] not in special:
        raise UserError(
            f"the chat template ends an assistant's turn with {after!r}, which begins with no special token; "
            "set config.data.terminator to the token that ends an answer"
        )
    return int(ids[0])


def _generation_prefix(template: "_Template", options: ChatOptions) -> str:
    if options.generation_prefix != "auto":
        return options.generation_prefix
    if options.enable_thinking:
        return ""
    before, _ = template.around_answer()
    prompt = template.render([_QUESTION], generation_prompt=True)
    return before.removeprefix(prompt) if before.startswith(prompt) else ""


def _written(date: datetime.date, form: str) -> str:
    """`strftime` with English names: those of the process's locale would be another prompt."""
    month, day = _MONTHS[date.month - 1], _DAYS[date.weekday()]
    names = {"%B": month, "%b": month[:3], "%h": month[:3], "%A": day, "%a": day[:3]}
    return date.strftime(re.sub("%.", lambda match: names.get(match[0], match[0]), form))


@dataclass(frozen=True)
class _Template:
    """A chat template whose date is pinned, with the arguments it is rendered with."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> "_Template":
        """Replaces every call for today's date by `options.date` in the format that the call asks for.

        The text is changed, not the template's arguments: transformers 5 lets no argument replace the function.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template; use an instruction-tuned checkpoint or set config.model.tokenizer"
            )
        try:
            date = datetime.date.fromisoformat(options.date)
        except ValueError as error:
            raise UserError(f"config.data.chat.date={options.date!r} is no date in ISO form, as 2024-07-26") from error
        text = tokenizer.get_chat_template()
        arguments: dict[str, Any] = {
            "enable_thinking": options.enable_thinking,
            "reasoning_effort": options.reasoning_effort,
        }
        if not _ANY_DATE_CALL.search(text):
            arguments["date_string"] = _written(date, _DATE_STRING_FORMAT)
        text = _DATE_CALL.sub(lambda match: json.dumps(_written(date, match.group(2))), text)
        if _ANY_DATE_CALL.search(text):
            raise UserError(
                "the chat template calls strftime_now with something else than a quoted format, so the date in the "
                'prompt cannot be pinned; write the format into the template as in strftime_now("%Y-%m-%d")'
            )
        return cls(tokenizer, text, arguments)

    def render(self, messages: Messages, *, generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.text,
                tokenize=False,
                return_dict=False,
                add_generation_prompt=generation_prompt,
                **self.arguments,
            )
        except (jinja2.TemplateError, KeyError) as error:
            raise UserError(f"the chat template refuses the messages {list(messages)!r}: {error}") from error
        assert isinstance(text, str)
        return text

    def around_answer(self) -> tuple[str, str]:
        """What the template writes before and after the content of an assistant's last turn."""
        turns = [_QUESTION, {"role": "assistant", "content": _ANSWER}]
        before, answer, after = self.render(turns, generation_prompt=False).rpartition(_ANSWER)
        if not answer:
            raise UserError(
                "the chat template does not write an assistant's turn; "
                "set config.data.terminator and config.data.chat.generation_prefix"
            )
        return before, after
