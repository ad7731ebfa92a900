"""Mistakes in how a server turns messages into tokens, as the prompts that the model then sees."""

import dataclasses
import datetime
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.text import ChatOptions, encode_chats
from cft_jax.text.chat import Messages

# The system prompt that servers and templates add by themselves, where they add one.
SYSTEM = "You are a helpful assistant."
_Encode = Callable[[Messages], list[int]]


def wrong_prompts(
    tokenizer: PreTrainedTokenizerBase,
    options: ChatOptions,
    conversations: Sequence[Messages],
    *,
    today: datetime.date,
) -> dict[str, list[list[int]]]:
    """Token ids of all conversations under every mistake that changes those of any, by the mistake's name.

    Args:
      tokenizer: of the model.
      options: how the model was trained to be asked.
      conversations: the prompts.
      today: the date that a template prints where nothing pins it.
    """
    right = encode_chats(tokenizer, conversations, options)
    found = {}
    for name, encode in _mistakes(tokenizer, options, today).items():
        try:
            wrong = [encode(messages) for messages in conversations]
        except UserError:
            continue  # a template may refuse such messages
        if wrong != right and all(wrong):
            found[name] = wrong
    return found


def _mistakes(tokenizer: PreTrainedTokenizerBase, options: ChatOptions, today: datetime.date) -> dict[str, _Encode]:
    def chat(messages: Messages, **changes: object) -> list[int]:
        return encode_chats(tokenizer, [messages], dataclasses.replace(options, **changes))[0]  # type: ignore[arg-type]

    def plain(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])  # type: ignore[arg-type]

    thinks = not options.enable_thinking
    return {
        "doubled BOS": lambda messages: chat(messages, duplicate_bos=not options.duplicate_bos),
        f"thinking mode {'on' if thinks else 'off'}": lambda messages: chat(messages, enable_thinking=thinks),
        "generation prefix missing": lambda messages: chat(messages, generation_prefix=""),
        "another date": lambda messages: chat(messages, date=today.isoformat()),
        "system prompt": lambda messages: chat([{"role": "system", "content": SYSTEM}, *messages]),
        "no chat template": lambda messages: plain("\n".join(message["content"] for message in messages)),
        "another chat template (ChatML)": lambda messages: plain(_chatml(messages)),
    }


def _chatml(messages: Messages) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join([*turns, "<|im_start|>assistant\n"])
