"""Loading a tokenizer with errors a user can act on, and encoding many strings at once."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cft_jax.common import hub
from cft_jax.common.errors import UserError

# Any one of these makes a directory loadable; transformers converts the older two.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path_or_id: str, *, revision: str, local_files_only: bool) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory in HF format or of a hub id; never runs code that comes with it.

    Args:
      path_or_id: a directory, an address such as gs://bucket/qwen3, or a hub id such as "Qwen/Qwen3-0.6B".
      revision: branch, tag or commit of a hub id; directories ignore it.
      local_files_only: take a hub id from the local cache alone.

    Raises:
      UserError: the directory is missing, holds no tokenizer or a half-written one; the hub has no such
        tokenizer or cannot be reached; or the tokenizer has no fast implementation.
    """
    path, _ = hub.resolve(path_or_id, revision=revision, local_files_only=local_files_only, patterns=hub.TOKENIZER)
    if not any((path / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"tokenizer directory {str(path)!r} holds none of {', '.join(_VOCABULARY_FILES)}; copy the tokenizer's "
            "files there or set config.model.tokenizer"
        )
    loaded = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        loaded = True
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer of {path_or_id!r} cannot be loaded: {_first_line(error)}") from error
    finally:
        # The fast tokenizers raise a bare Exception for a damaged file; only then are files of many MB worth a check.
        if not loaded:
            _check_files(path)
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise UserError(f"tokenizer {path_or_id!r} has no fast implementation; save it with a tokenizer.json")
    return tokenizer


def _check_files(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            json.loads(file.read_bytes())
        except ValueError as error:  # covers broken JSON and broken UTF-8
            raise UserError(
                f"{str(file)!r} is damaged or half-written ({_first_line(error)}); copy it again"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """The Rust tokenizer behind `tokenizer`.

    Raises:
      UserError: there is none.
    """
    found = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(found, tokenizers.Tokenizer):
        raise UserError(
            f"{type(tokenizer).__name__} has no fast implementation; load a tokenizer with a tokenizer.json"
        )
    return found


def encode_strings(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    """Token ids of every string, each encoded alone and without special tokens."""
    rust = backend(tokenizer)
    return [encoding.ids for encoding in rust.encode_batch_fast(list(strings), add_special_tokens=False)]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides token ids and rendered chats: vocabulary, merges, rules, template, special tokens."""
    rules = backend(tokenizer).to_str()
    # Before them stand the padding and truncation of the latest call.
    digest = hashlib.sha256(rules[rules.index('"added_tokens"') :].encode())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    for part in (tokenizer.chat_template, special):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()
