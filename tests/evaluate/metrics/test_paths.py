"""Figures along the paths of a trie, against sums over each string written out."""

import numpy as np
import pytest

from cft_jax.evaluate.metrics import paths
from cft_jax.text.paths import string_log_probs
from cft_jax.text.trie import grow_forest, token_matrix

TERMINATOR = 9
STRINGS = ((1, 2), (1,), (3, 4, 5), (3, 4), (1, 2, 6))
PROBABILITIES = np.array([0.25, 0.125, 0.5, 0.0, 0.125])


@pytest.fixture(scope="module")
def trie():
    tokens, lengths = token_matrix(STRINGS)
    forest = grow_forest(tokens, lengths, np.zeros(5, np.int64), PROBABILITIES, terminator_id=TERMINATOR, describe=str)
    return forest.trie(0)


def model_log_prob(prefix, token):
    """A distribution over 10 tokens that differs at every prefix."""
    logits = np.sin(np.arange(10) * (1.0 + sum(prefix)) + len(prefix))
    return logits[token] - np.log(np.exp(logits).sum())


@pytest.fixture(scope="module")
def child_log_probs(trie):
    tokens = []
    for prefix in range(trie.num_prefixes):
        path = []
        while prefix > 0:
            path.append(int(trie.token[prefix]))
            prefix = int(trie.parent[prefix])
        tokens.append(tuple(reversed(path)))
    rows = zip(tokens, trie.child_offsets[:-1], trie.child_offsets[1:], strict=True)
    return np.array([model_log_prob(prefix, c) for prefix, a, b in rows for c in trie.child_ids[a:b]])


def steps_of(string):
    return [(string[:n], token) for n, token in enumerate((*string, TERMINATOR))]


def test_string_log_probs(trie, child_log_probs):
    expected = [sum(model_log_prob(*step) for step in steps_of(string)) for string in STRINGS]
    assert string_log_probs(trie, child_log_probs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epsilon", [1e-8, 0.2])
def test_path_kl(trie, child_log_probs, epsilon):
    expected = []
    for string in STRINGS:
        kls = []
        for prefix, _ in steps_of(string):
            ids, probs = trie.children(prefix)
            q = np.maximum(probs, epsilon) / np.maximum(probs, epsilon).sum()
            model = np.array([model_log_prob(prefix, token) for token in ids])
            kls.append(np.sum(q * (np.log(q) - model)))
        expected.append(np.mean(kls))
    got = paths.path_kl(trie, paths.step_kl(trie, child_log_probs, epsilon))
    # All prefixes of the strings that can be drawn have probability; number 3 cannot be drawn.
    drawn = PROBABILITIES > 0
    assert got[drawn] == pytest.approx(np.array(expected)[drawn], rel=1e-12)


def test_only_the_scored_prefixes_are_needed(trie, child_log_probs):
    strings = np.array([1, 2])
    prefixes = paths.path_prefixes(trie, strings)
    assert {int(p) for p in prefixes} == {trie.find(string[:n]) for string in ((1,), (3, 4, 5)) for n in range(4)}
    partial = np.full_like(child_log_probs, np.nan)
    for prefix in prefixes:
        entries = slice(trie.child_offsets[prefix], trie.child_offsets[prefix + 1])
        partial[entries] = child_log_probs[entries]
    whole, part = (paths.path_kl(trie, paths.step_kl(trie, scores, 1e-8)) for scores in (child_log_probs, partial))
    assert part[strings] == pytest.approx(whole[strings], rel=1e-15)
    assert np.isnan(part[0])
