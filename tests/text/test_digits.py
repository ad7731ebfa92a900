"""Which tokenizers read numbers in a regular way, and that composed tokens equal whole-string encoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cft_jax.common.errors import UserError
from cft_jax.distributions.output_space import decimal_strings
from cft_jax.text.digits import digit_counts, digit_tokens
from cft_jax.text.tokenizer import encode_strings, load_tokenizer

# What each real tokenizer does stands in the README of their directory.
GROUPS = {"llama3": 3, "gpt_oss": 3, "qwen3": 1, "gemma3": 1}


@pytest.fixture(scope="module")
def tokenizers(tokenizers_dir):
    names = [name for name in GROUPS if (tokenizers_dir / name).is_dir()]
    return {n: load_tokenizer(str(tokenizers_dir / n), revision="main", local_files_only=True) for n in names}


def test_group_sizes_and_ids_are_the_tokenizers_own(tokenizers):
    for name, tokenizer in tokenizers.items():
        numbers = digit_tokens(tokenizer)
        assert numbers.group == GROUPS[name]
        assert [run.size for run in numbers.runs] == [10**w for w in range(1, numbers.group + 1)]
        assert tokenizer.convert_ids_to_tokens([numbers.minus, numbers.point]) == ["-", "."]
        for run_width, run in enumerate(numbers.runs, 1):
            assert tokenizer.convert_ids_to_tokens(run.tolist()) == [f"{v:0{run_width}d}" for v in range(run.size)]


@settings(max_examples=100, deadline=None)
@given(
    integers=st.lists(st.integers(-(10**18) + 1, 10**18 - 1), min_size=1, max_size=20), num_decimals=st.integers(0, 17)
)
def test_composed_tokens_equal_whole_string_encoding(tokenizers, integers, num_decimals):
    array = np.array(integers, dtype=np.int64)
    texts = decimal_strings(array, num_decimals)
    for tokenizer in tokenizers.values():
        tokens, lengths = digit_tokens_of(tokenizer).encode(array, num_decimals)
        for text, row, length in zip(encode_strings(tokenizer, texts), tokens, lengths, strict=True):
            assert text == row[:length].tolist()
            assert (row[length:] == -1).all()


_FOUND = {}


def digit_tokens_of(tokenizer):
    if id(tokenizer) not in _FOUND:
        _FOUND[id(tokenizer)] = digit_tokens(tokenizer)
    return _FOUND[id(tokenizer)]


def test_strings_have_exact_decimals_and_no_minus_zero():
    # By hand: two decimals.
    assert decimal_strings(np.array([0, -1, 123456, -100]), 2) == ["0.00", "-0.01", "1234.56", "-1.00"]


def test_digit_counts():
    assert digit_counts(np.array([0, 1, 9, 10, 999, 1000, 10**17, 10**18 - 1])).tolist() == [1, 1, 1, 2, 3, 4, 18, 18]


def test_no_numbers_encode_to_an_empty_table(tokenizers):
    for tokenizer in tokenizers.values():
        tokens, lengths = digit_tokens_of(tokenizer).encode(np.zeros(0, dtype=np.int64), 5)
        assert tokens.shape[0] == 0 and lengths.shape == (0,)


def test_irregular_tokenizer_is_refused_with_the_way_out(small_tokenizer):
    # It joins "12" and "00" but no other digits.
    with pytest.raises(UserError, match=r"neither digit by digit.*config\.data\.space=grid"):
        digit_tokens(small_tokenizer)
