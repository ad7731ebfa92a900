"""Loading a tokenizer with errors a user can act on, and encoding many strings at once."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.common.hub_access import hub_answers
from cft_jax.common.stores import fetched, is_remote

# Any one of these makes a directory loadable; transformers converts the older two.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What is copied from an object store: all but the weights.
_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


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
    path = fetched(path_or_id, _FILES) if is_remote(path_or_id) else Path(path_or_id).expanduser()
    is_directory = path.is_dir()
    if is_directory:
        _check_directory(path)
    elif path.exists():
        raise UserError(f"{path_or_id!r} is a file; give the directory that holds it")
    elif not _could_be_hub_id(path_or_id):
        raise UserError(
            f"{path_or_id!r}: no such directory; give config.model.checkpoint (or config.model.tokenizer) a directory "
            "in HF format or a hub id"
        )
    asked = not is_directory and not local_files_only and hub_answers()
    loaded = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if is_directory else path_or_id,
            revision=revision,
            local_files_only=not asked,
            trust_remote_code=False,
        )
        loaded = True
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_loading_problem(path_or_id, is_directory, local_files_only, asked, error)) from error
    finally:
        # The fast tokenizers raise a bare Exception for a damaged file; only then are files of many MB worth a check.
        if not loaded and is_directory:
            _check_files(path)
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise UserError(f"tokenizer {path_or_id!r} has no fast implementation; save it with a tokenizer.json")
    return tokenizer


def _could_be_hub_id(text: str) -> bool:
    return bool(text) and text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def _check_directory(path: Path) -> None:
    if not any((path / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"tokenizer directory {str(path)!r} holds none of {', '.join(_VOCABULARY_FILES)}; "
            "copy the tokenizer's files there or set config.model.tokenizer"
        )


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


def _loading_problem(path_or_id: str, is_directory: bool, local_files_only: bool, asked: bool, error: Exception) -> str:
    if is_directory:
        return f"tokenizer directory {path_or_id!r} cannot be loaded: {_first_line(error)}"
    if local_files_only:
        return f"{path_or_id!r} was not downloaded before; set config.model.local_files_only=False to download it"
    if not asked:
        return (
            f"{path_or_id!r} was not downloaded before, and the Hugging Face hub does not answer; check the network "
            "and HF_HUB_OFFLINE, or give a directory as config.model.checkpoint"
        )
    if "gated" in str(error):
        return (
            f"{path_or_id} is gated: accept its licence at https://huggingface.co/{path_or_id} and set HF_TOKEN to a "
            "token of that account"
        )
    return (
        f"the tokenizer of {path_or_id!r} cannot be had from the Hugging Face hub ({_first_line(error)}); check the "
        "name, the network and HF_TOKEN, or give a local directory"
    )


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
    digest = hashlib.sha256(backend(tokenizer).to_str().encode())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    for part in (tokenizer.chat_template, special):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()
