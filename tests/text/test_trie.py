"""Tries against the reference's golden ones, against a dictionary-based trie, and by their defining properties."""

import gzip
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cft_jax.common.errors import UserError
from cft_jax.distributions import OutputSpace, PromptSpec, output_space
from cft_jax.text.tokenizer import encode_strings, load_tokenizer
from cft_jax.text.trie import build_trie, grow_forest, token_matrix

END = 99
FOLDERS = {"qwen3": "qwen3", "gemma3": "gemma3", "llama3_2": "llama3"}


def grow(sequences, probabilities=None):
    """The trie of token sequences, by default equally probable."""
    tokens, lengths = token_matrix(sequences)
    probabilities = np.full(len(sequences), 1 / len(sequences)) if probabilities is None else np.array(probabilities)
    groups = np.zeros(len(sequences), dtype=np.int64)
    return grow_forest(
        tokens, lengths, groups, probabilities, terminator_id=END, describe=lambda row: f"value {row}"
    ).trie(0)


def all_prefixes(trie):
    prefixes = [()]
    for parent, token in zip(trie.parent[1:].tolist(), trie.token[1:].tolist(), strict=True):
        prefixes.append((*prefixes[parent], token))
    return prefixes


def by_dictionary(sequences, probabilities):
    """The definition, word for word: masses of all proper prefixes of the terminated sequences and their children."""
    children: dict[tuple, dict[int, float]] = {}
    for sequence, probability in zip(sequences, probabilities, strict=True):
        ended = (*sequence, END)
        for length in range(len(ended)):
            masses = children.setdefault(ended[:length], {})
            masses[ended[length]] = masses.get(ended[length], 0.0) + probability
    return children


@pytest.mark.parametrize("name", FOLDERS)
def test_tries_equal_the_golden_ones(golden, tokenizers_dir, name):
    tokenizer = load_tokenizer(str(tokenizers_dir / FOLDERS[name]), revision="main", local_files_only=True)
    with gzip.open(golden / "trie.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["tokenizer"] == name]
    assert len(rows) == 15
    for row in rows:
        fields = {key: row[key] for key in ("split", "family_id", "distribution_id", "parameters")}
        space = output_space(
            PromptSpec(prompt="", **fields), num_decimals=row["num_decimals"], max_bins=row["max_bins"]
        )
        trie = build_trie(tokenizer, space, row["eos_token_id"])
        assert trie.leaf_prefix.size == row["num_candidates"]
        for figure in ("num_prefixes", "max_children", "max_depth"):
            assert getattr(trie, figure) == row[figure]
        assert trie.child_ids.size == row["total_children"]
        assert (np.diff(trie.child_offsets) > 1).sum() == row["num_branching_prefixes"]
        lines = []
        for prefix in all_prefixes(trie):
            lines.append(",".join(map(str, prefix)) + ":" + ",".join(map(str, trie.children(prefix)[0].tolist())))
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == row["structure_sha256"]
        for expected in row["prefixes"]:
            ids, probabilities = trie.children(expected["prefix"])
            assert ids.tolist() == expected["child_ids"]
            np.testing.assert_allclose(probabilities, expected["child_probs"], rtol=1e-12, atol=1e-15)
        leaves, probabilities = trie.leaves()
        for expected in row["candidates"]:
            assert leaves[expected["index"]] == tuple(expected["token_ids"])
        assert np.array_equal(probabilities, space.probabilities)


# Few tokens and short strings, so that prefixes of each other, the empty string and shared tokens are common.
SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=5).map(tuple), min_size=1, max_size=30, unique=True)


@given(SEQUENCES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_any_trie_equals_its_definition(sequences, random):
    masses = np.array([random.choice([0.0, random.random()]) for _ in sequences]) + (np.arange(len(sequences)) == 0)
    probabilities = masses / masses.sum()
    trie = grow(sequences, probabilities)
    expected = by_dictionary(sequences, probabilities)
    prefixes = all_prefixes(trie)
    assert prefixes == sorted(expected)
    for index, prefix in enumerate(prefixes):
        ids, conditional = trie.children(prefix)
        masses = expected[prefix]
        assert ids.tolist() == sorted(masses)
        reach = sum(masses.values())
        np.testing.assert_allclose(trie.reach[index], reach, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(
            conditional, [masses[token] / reach if reach else 0.0 for token in ids.tolist()], rtol=1e-12
        )
        np.testing.assert_allclose(conditional.sum(), 1.0 if reach else 0.0, rtol=1e-12)
        below = [other for other in range(len(prefixes)) if prefixes[other][: len(prefix)] == prefix]
        assert below == list(range(index, trie.subtree_end[index]))
        assert trie.depth[index] == len(prefix)
    leaves, leaf_probabilities = trie.leaves()
    assert leaves == sequences
    np.testing.assert_array_equal(leaf_probabilities, probabilities)
    assert [prefixes[leaf] for leaf in trie.leaf_prefix] == sequences


@given(SEQUENCES)
@settings(deadline=None)
def test_products_of_child_probabilities_recompose_the_space(sequences):
    probabilities = np.random.default_rng(len(sequences)).dirichlet(np.ones(len(sequences)))
    trie = grow(sequences, probabilities)
    for sequence, probability in zip(sequences, probabilities, strict=True):
        product = 1.0
        for length, token in enumerate((*sequence, END)):
            ids, conditional = trie.children(sequence[:length])
            product *= conditional[ids.tolist().index(token)]
        np.testing.assert_allclose(product, probability, rtol=1e-12)


def test_tries_grown_together_equal_tries_grown_alone():
    lists = [[(1, 2), (1,), (3,)], [()], [(2,), (1, 1, 1), (1, 2)], [(3, 3, 3, 3)]]
    probabilities = [[0.5, 0.25, 0.25], [1.0], [0.1, 0.2, 0.7], [1.0]]
    tokens, lengths = token_matrix([sequence for sequences in lists for sequence in sequences])
    groups = np.repeat(np.arange(4), [3, 1, 3, 1])
    forest = grow_forest(
        tokens, lengths, groups, np.concatenate(probabilities), terminator_id=END, describe=lambda row: f"value {row}"
    )
    assert len(forest) == 4
    for index, (sequences, masses) in enumerate(zip(lists, probabilities, strict=True)):
        together, alone = forest.trie(index), grow(sequences, masses)
        for name in vars(alone):
            np.testing.assert_array_equal(getattr(together, name), getattr(alone, name), err_msg=name)
            assert np.asarray(getattr(together, name)).dtype == np.asarray(getattr(alone, name)).dtype, name


def test_unknown_prefixes_are_not_found():
    trie = grow([(1, 2), (3,)])
    for prefix in ((2,), (1, 3), (1, 2, END), (END,), (1, 2, 2)):
        with pytest.raises(KeyError):
            trie.find(prefix)
    assert trie.children(())[0].tolist() == [1, 3]


def test_values_of_any_text_are_exact(small_tokenizer):
    end = small_tokenizer.eos_token_id
    space = OutputSpace(("", "ab", "abc", "a", "two\nlines", "té 🎲", "12", "1"), np.full(8, 1 / 8))
    trie = build_trie(small_tokenizer, space, end)
    leaves, _ = trie.leaves()
    assert [small_tokenizer.decode(leaf) for leaf in leaves] == list(space.values)
    assert [list(leaf) for leaf in leaves] == encode_strings(small_tokenizer, space.values)
    ids, probabilities = trie.children(())
    assert probabilities[ids == end] == 1 / 8  # the empty string ends at once
    assert 1.0 not in probabilities


def test_values_with_the_same_tokens_are_an_error(tokenizers_dir):
    # Qwen3's tokenizer normalises to NFC, so the composed and the decomposed é have the same tokens.
    tokenizer = load_tokenizer(str(tokenizers_dir / "qwen3"), revision="main", local_files_only=True)
    space = OutputSpace(("x", "caf\u00e9", "cafe\u0301"), np.full(3, 1 / 3))
    with pytest.raises(UserError, match="have the same tokens"):
        build_trie(tokenizer, space, 151645)
    with pytest.raises(UserError, match=r"value 0 and value 2 have the same tokens"):
        grow([(1,), (2,), (1,)])


def test_a_value_that_contains_the_terminator_is_an_error(small_tokenizer):
    space = OutputSpace(("a", "b</s>"), np.full(2, 0.5))
    with pytest.raises(UserError, match=r"value 'b</s>' contains the terminator"):
        build_trie(small_tokenizer, space, small_tokenizer.eos_token_id)
