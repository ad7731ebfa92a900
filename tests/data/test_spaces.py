"""Tables of output spaces: drawing, writing and encoding, against the spaces themselves."""

import numpy as np
import pytest
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.config import DataConfig
from cft_jax.data.spaces import SpaceTable, draw_indices, listed_forest, task_space
from cft_jax.distributions import OutputSpace, PromptSpec, Task, output_space, task_from_spec
from cft_jax.text.tokenizer import encode_strings, load_tokenizer
from cft_jax.text.trie import build_trie
from cft_jax.text.values import ValueEncoder

FAMILIES = {
    "gaussian": {"mu": 0.0, "sigma": 1.5},
    "lognormal": {"mu": 2.0, "sigma": 1.0},
    "binomial": {"n": 20.0, "p": 0.3},
    "skellam": {"mu1": 3.0, "mu2": 5.0},
}
WORDS = OutputSpace(("yes", "no", "", "yes, of\ncourse"), np.array([0.5, 0.25, 0.0, 0.25]))
DATA = DataConfig(num_decimals=3, max_bins=200)


def family_task(family):
    return task_from_spec(PromptSpec("train", family, family, FAMILIES[family], f"Draw from {family}."))


def tasks():
    words = Task("train", "custom", "words", ({"role": "user", "content": "Say."},), space=WORDS)
    return [*map(family_task, FAMILIES), words]


def listed(task):
    return task.space or output_space(task.spec, num_decimals=3, max_bins=200)


@pytest.mark.parametrize("name", ["small", "qwen3", "llama3", "gemma3"])
def test_values_are_encoded_as_their_strings(request, name, small_tokenizer):
    tokenizer = small_tokenizer
    if name != "small":
        directory = request.getfixturevalue("tokenizers_dir") / name
        tokenizer = load_tokenizer(str(directory), revision="main", local_files_only=True)
    encoder = ValueEncoder(tokenizer)
    assert (encoder._digits is not None) == (name != "small"), "whether numbers are composed of their digits' tokens"
    table = SpaceTable(task_space(task, DATA) for task in tasks())
    for index, task in enumerate(tasks()):
        values = listed(task).values
        codes = np.arange(len(values))
        assert [table.write(index, code) for code in codes.tolist()] == list(values)
        tokens, lengths = table.encode(encoder, np.full(len(values), index), codes)
        found = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        assert found == encode_strings(tokenizer, values)
        assert (tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] == -1).all()


def test_a_difference_found_later_ends_the_composing(tokenizers_dir):
    tokenizer = load_tokenizer(str(tokenizers_dir / "qwen3"), revision="main", local_files_only=True)
    encoder = ValueEncoder(tokenizer)
    integers = np.arange(-50.0, 50.0)
    before = encoder.numbers(integers, 2)
    # A token for a number that whole-string encoding will now find, as if the first check had missed it.
    tokenizer.add_tokens(["0.4", "-0.4"])
    after = encoder.numbers(integers, 2)
    assert encoder._digits is None
    assert not np.array_equal(before[1], after[1])


def test_forests_equal_tries_built_alone(small_tokenizer):
    end = small_tokenizer.eos_token_id
    forest = listed_forest(
        ValueEncoder(small_tokenizer), [task_space(task, DATA) for task in tasks()], ["a", "b", "c", "d", "e"], end
    )
    for index, task in enumerate(tasks()):
        alone = build_trie(small_tokenizer, listed(task), end)
        for name in vars(alone):
            # Writing a space's strings divides its probabilities by their sum once more, which may change the last bit.
            np.testing.assert_allclose(
                getattr(forest.trie(index), name), getattr(alone, name), rtol=1e-15, err_msg=name
            )


def test_errors_name_the_task_and_the_value(small_tokenizer):
    bad = OutputSpace(("fine", "not</s>"), np.array([0.5, 0.5]))
    with pytest.raises(UserError, match=r"task second: value 'not</s>' contains the terminator"):
        listed_forest(ValueEncoder(small_tokenizer), [WORDS, bad], ["first", "second"], small_tokenizer.eos_token_id)


def test_draws_follow_the_space():
    # Chi-square of 20,000 draws on each space, pooled to cells of 20 and more; p > 1e-4 fails once in 10,000 runs.
    table = SpaceTable(task_space(task, DATA) for task in tasks())
    uniforms = np.random.default_rng(0).random((5, 20_000))
    drawn = table.draw(np.arange(5), uniforms)
    for index, task in enumerate(tasks()):
        probabilities = listed(task).probabilities
        counts = np.bincount(drawn[index], minlength=probabilities.size)
        assert (counts[probabilities == 0] == 0).all()
        cell = np.cumsum(probabilities) * 20_000 // 20
        observed = np.bincount(np.unique(cell, return_inverse=True)[1], weights=counts)
        expected = np.bincount(np.unique(cell, return_inverse=True)[1], weights=probabilities * 20_000)
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_draws_at_the_ends_have_probability():
    cumulative = np.cumsum([0.0, 0.5, 0.0, 0.5 - 2**-54, 0.0])
    assert draw_indices(cumulative, np.array([0.0, 0.5 - 1e-9, 0.5 + 1e-9, 1 - 2**-53])).tolist() == [1, 1, 3, 3]
