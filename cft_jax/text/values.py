"""Token ids of many values at once; numbers are composed of their digits' tokens where the tokenizer allows it."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32, Int64, Real
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.distributions.output_space import decimal_strings
from cft_jax.distributions.tasks import Task
from cft_jax.text.digits import MAX_DIGITS, digit_tokens
from cft_jax.text.tokenizer import backend, encode_strings
from cft_jax.text.trie import token_matrix

_SAMPLES_PER_CALL = 8


def check_values(tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Task]) -> None:
    """Checks that listed values read as they are written when a model answers with their tokens.

    A tokenizer may normalise text (Qwen3: to NFC), and answers are read without special tokens: such a value would be
    trained on and never be found in an answer. Families' numbers always survive.

    Raises:
      UserError: naming the first value that does not.
    """
    for task in tasks:
        if task.space is not None:
            check_strings(tokenizer, task.space.values, f"task {task.task_id}")


def check_strings(tokenizer: PreTrainedTokenizerBase, values: Sequence[str], name: str) -> None:
    """`check_values` for values alone; `name` is for the message."""
    answers = backend(tokenizer).decode_batch(encode_strings(tokenizer, values), skip_special_tokens=True)
    for value, answer in zip(values, answers, strict=True):
        if value != answer:
            raise UserError(
                f"{name}: the value {value!a} becomes {answer!a} in this tokenizer's tokens, "
                "so that no answer could be told to be it; write it as the tokenizer does, without special tokens"
            )


class ValueEncoder:
    """Encodes values alone and without special tokens, as `encode_strings` does.

    Whether the tokenizer reads numbers digit by digit or in groups of three is checked once on numbers of every shape
    (`digit_tokens`) and on a sample of every call. At the first difference numbers are encoded as plain strings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        try:
            self._digits = digit_tokens(tokenizer)
        except UserError:
            self._digits = None

    def strings(self, values: Sequence[str]) -> tuple[Int32[np.ndarray, "S T"], Int64[np.ndarray, "S"]]:
        """Token ids of strings, -1 after the end of a row, and their numbers."""
        return token_matrix(encode_strings(self._tokenizer, values))

    def numbers(
        self, integers: Real[np.ndarray, "S"], num_decimals: int
    ) -> tuple[Int32[np.ndarray, "S T"], Int64[np.ndarray, "S"]]:
        """Token ids of the strings of k · 10**-num_decimals, -1 after the end of a row, and their numbers.

        Args:
          integers: the k, whole numbers; the double -0.0 is written with its sign.
          num_decimals: decimals of every string.
        """
        has_minus_zero = bool((np.signbit(integers) & (integers == 0)).any())
        is_small = bool((np.abs(integers) < 10.0**MAX_DIGITS).all()) and num_decimals < MAX_DIGITS
        if self._digits is None or has_minus_zero or not is_small:
            return self.strings(decimal_strings(integers, num_decimals))
        tokens, lengths = self._digits.encode(integers.astype(np.int64), num_decimals)
        stride = max(1, integers.size // _SAMPLES_PER_CALL)
        # From an offset that the values decide, so that the same call always checks the same ones.
        sample = np.arange(int(np.abs(integers).max(initial=0)) % stride, integers.size, stride)
        plain = encode_strings(self._tokenizer, decimal_strings(integers[sample], num_decimals))
        if plain != [tokens[row, : lengths[row]].tolist() for row in sample]:
            self._digits = None
            return self.strings(decimal_strings(integers, num_decimals))
        return tokens, lengths
