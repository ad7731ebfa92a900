"""How a tokenizer reads numbers: digit by digit, or in groups of up to three digits from the left.

Qwen3 and Gemma read "-1234.56789" as -|1|2|3|4|.|5|6|7|8|9, Llama 3 and gpt-oss as -|123|4|.|567|89: groups are cut
from the left, anew after the point, and a group shorter than three digits ends its run. Which of the two a tokenizer
does is read off the tokenizer itself and checked against its encoding of whole strings.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.distributions.output_space import decimal_strings
from cft_jax.text.tokenizer import encode_strings

# Numbers are handled as the integer k of k * 10**-d; with at most 18 digits all sums and products stay in int64.
MAX_DIGITS = 18
POWERS = 10 ** np.arange(MAX_DIGITS + 1, dtype=np.int64)
_CHECKED_PER_SHAPE = 3


@dataclass(frozen=True, eq=False)
class DigitTokens:
    """The tokens that numbers are made of.

    Attributes:
      group: most digits in one token: 1 (digit by digit) or 3.
      runs: `runs[w - 1][v]` is the id of the w digits of v, leading zeros kept; int32[10**w] for w = 1..group.
      minus, point: ids of "-" and ".".
    """

    group: int
    runs: tuple[Int[np.ndarray, "_"], ...]
    minus: int
    point: int

    def encode(
        self, integers: Int[np.ndarray, "N"], num_decimals: int
    ) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N"]]:
        """Tokens of the strings of k * 10**-num_decimals with exactly that many decimals.

        Args:
          integers: the k, of at most 18 digits; 0 has no sign.
          num_decimals: 0 to 17; with 0 there is no point.

        Returns:
          int32[N, T] token ids, -1 after the end of a string, and int64[N] numbers of tokens.
        """
        size = np.abs(integers.astype(np.int64))
        whole, decimals = np.divmod(size, np.int64(10**num_decimals))
        num_digits = digit_counts(whole)
        first = (integers < 0).astype(np.int64)
        num_groups = -(-num_digits // self.group)
        num_after = 1 + -(-num_decimals // self.group) if num_decimals else 0
        lengths = first + num_groups + num_after
        tokens = np.full((size.size, int(lengths.max(initial=1))), -1, dtype=np.int32)
        tokens[integers < 0, 0] = self.minus
        for index in range(int(num_groups.max(initial=0))):
            rows = np.flatnonzero(num_groups > index)
            left = num_digits[rows] - index * self.group
            tokens[rows, first[rows] + index] = self._group_tokens(whole[rows], left)
        if num_decimals:
            rows = np.arange(size.size)
            tokens[rows, first + num_groups] = self.point
            for index in range(num_after - 1):
                left = np.full(size.size, num_decimals - index * self.group)
                tokens[rows, first + num_groups + 1 + index] = self._group_tokens(decimals, left)
        return tokens, lengths

    def _group_tokens(self, values: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Ids of the first group of the last `left` digits of each value."""
        width = np.minimum(left, self.group)
        digits = values // POWERS[left - width] % POWERS[width]
        # The runs one after another: those of w digits begin after 10 + ... + 10**(w - 1) shorter ones.
        return np.concatenate(self.runs)[(POWERS[width] - 10) // 9 + digits]


def digit_counts(integers: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Number of decimal digits of integers 0 ≤ n < 10**18; one for 0."""
    return np.maximum(np.searchsorted(POWERS, integers, side="right"), 1)


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> DigitTokens:
    """Finds how a tokenizer reads numbers and checks it on numbers of every length, sign and number of decimals.

    Raises:
      UserError: it reads them neither digit by digit nor in groups of three from the left.
    """
    minus, point = _single_tokens(tokenizer, ["-", "."])
    widths = range(1, 4)
    runs = [_single_tokens(tokenizer, [f"{v:0{w}d}" for v in range(10**w)]) for w in widths]
    one_token = [bool((run >= 0).all()) for run in runs]
    group = 3 if all(one_token) else 1
    if minus < 0 or point < 0 or not one_token[0]:
        raise UserError(_refusal(tokenizer, "-0.5"))
    ids = np.concatenate([[minus, point], *runs[:group]])
    if np.unique(ids).size < ids.size:
        raise UserError(_refusal(tokenizer, "-0.5"))
    numbers = DigitTokens(group, tuple(runs[:group]), int(minus), int(point))
    _check(tokenizer, numbers)
    return numbers


def _single_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Int[np.ndarray, "N"]:
    """The id of every text that is one token, -1 for the others."""
    return np.array([ids[0] if len(ids) == 1 else -1 for ids in encode_strings(tokenizer, texts)], dtype=np.int32)


def _check(tokenizer: PreTrainedTokenizerBase, numbers: DigitTokens) -> None:
    """Compares composed tokens with whole-string encoding."""
    generator = np.random.default_rng(0)
    for num_decimals in range(MAX_DIGITS):
        low = POWERS[: MAX_DIGITS - num_decimals] * POWERS[num_decimals]
        drawn = generator.integers(low, 10 * low, size=(_CHECKED_PER_SHAPE, low.size))
        below_one = generator.integers(0, POWERS[num_decimals], size=_CHECKED_PER_SHAPE)
        integers = np.concatenate([[0], below_one, low, drawn.ravel()])
        integers = np.concatenate([integers, -integers[integers > 0]])
        texts = decimal_strings(integers, num_decimals)
        tokens, lengths = numbers.encode(integers, num_decimals)
        for text, expected, row, length in zip(texts, encode_strings(tokenizer, texts), tokens, lengths, strict=True):
            if expected != row[:length].tolist():
                raise UserError(_refusal(tokenizer, text))


def _refusal(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    pieces = tokenizer.convert_ids_to_tokens(encode_strings(tokenizer, [text])[0])
    return (
        f"tokenizer {tokenizer.name_or_path!r} reads {text!r} as {pieces}, neither digit by digit nor in groups of "
        "three from the left; set config.data.space=grid"
    )
