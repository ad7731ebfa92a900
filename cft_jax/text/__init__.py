"""Text and tokens: chats to prompts, answers to tries."""

from cft_jax.distributions import strip_thinking
from cft_jax.text.chat import ChatOptions, encode_chat, encode_chats, terminator_id
from cft_jax.text.tokenizer import load_tokenizer
from cft_jax.text.trie import Forest, Trie, build_trie

__all__ = [
    "ChatOptions",
    "Forest",
    "Trie",
    "build_trie",
    "encode_chat",
    "encode_chats",
    "load_tokenizer",
    "strip_thinking",
    "terminator_id",
]
