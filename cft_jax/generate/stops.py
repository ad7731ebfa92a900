"""What ends a generation: stop tokens and stop strings."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.models.transformer import Transformer
from cft_jax.text.chat import terminator_id


def model_stop_ids(model: Transformer, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a generation of this model, ascending.

    These are all that the checkpoint's generation_config.json names (or, without one, its config.json), the one that
    the tokenizer names as its end of sequence, and the one that the chat template writes after an assistant's turn.

    Raises:
      UserError: generation_config.json is damaged, or nothing names a token.
    """
    found: set[int] = set()
    if model.source is not None:
        file = Path(model.source.directory) / "generation_config.json"
        found |= _ids(_read(file) if file.is_file() else model.source.config)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    if tokenizer.chat_template is not None:
        # A template may end turns in plain text, which is no token.
        with contextlib.suppress(UserError):
            found.add(terminator_id(tokenizer, "auto"))
    found = {token for token in found if token < model.config.vocab_size}
    if not found:
        raise UserError(
            "neither generation_config.json nor the tokenizer names a token that ends a text; add eos_token"
        )
    return tuple(sorted(found))


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{str(file)!r} is damaged or half-written ({error}); copy it again") from error


def _ids(config: dict) -> set[int]:
    named = config.get("eos_token_id")
    if named is None:
        return set()
    return set(named) if isinstance(named, list) else {named}


class StopStrings:
    """Finds stop strings at the end of growing texts.

    Args:
      tokenizer: turns tokens to text.
      stop: one string or several; none may be empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str | Sequence[str] | None) -> None:
        self.strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(string, str) and string for string in self.strings):
            raise UserError(f"stop={stop!r} must be a text or several, none of them empty")
        self._tokenizer = tokenizer
        # A token brings at least one byte, apart from special tokens, which bring nothing.
        self._tail = max((len(string.encode()) for string in self.strings), default=0) + 8

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens holds a stop string, which that of all but the last does not."""
        if not self.strings:
            return False
        text = self.text(tokens[-self._tail :])
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((text.find(string) for string in self.strings if string in text), default=len(text))]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
