"""What ends a generation: stop tokens and stop strings."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.models.transformer import Transformer
from cft_jax.text.chat import terminator_id


def model_stop_ids(model: Transformer, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a generation of this model, ascending: see `all_stop_ids`.

    Raises:
      UserError: nothing names a token.
    """
    named = () if model.source is None else model.source.stop_ids
    return all_stop_ids(named, tokenizer, vocab_size=model.config.vocab_size)


def all_stop_ids(named: Iterable[int], tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> tuple[int, ...]:
    """Every token that ends a generation, ascending.

    These are all that the checkpoint names (`cft_jax.models.source.Source.stop_ids`), the terminator of a trained
    model's answers among them, the one that the tokenizer names as its end of sequence, and the one that the chat
    template writes after an assistant's turn; tokens beyond the model's vocabulary are left out.

    Raises:
      UserError: nothing names a token.
    """
    stop_ids = set(named)
    if tokenizer.eos_token_id is not None:
        stop_ids.add(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    if tokenizer.chat_template is not None:
        # A template may end turns in plain text, which is no token.
        with contextlib.suppress(UserError):
            stop_ids.add(terminator_id(tokenizer, "auto"))
    stop_ids = {token for token in stop_ids if token < vocab_size}
    if not stop_ids:
        raise UserError(
            "neither generation_config.json nor the tokenizer names a token that ends a text; add eos_token"
        )
    return tuple(sorted(stop_ids))


def end_at(model: Transformer, tokenizer: PreTrainedTokenizerBase, terminator: str) -> None:
    """Makes a terminator of trained answers end every text of a model loaded from a checkpoint, beside all that do.

    Exports of the model name all these tokens, so that others stop where our sampler does. `terminator` is as in
    `terminator_id`, which raises its errors.
    """
    if model.source is None:
        raise ValueError("the model was not loaded from a checkpoint")
    named = {*model.source.stop_ids, terminator_id(tokenizer, terminator)}
    stop_ids = all_stop_ids(named, tokenizer, vocab_size=model.config.vocab_size)
    model.source = dataclasses.replace(model.source, stop_ids=stop_ids)


class StopStrings:
    """Finds stop strings, of which none may be empty, at the end of growing texts."""

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
