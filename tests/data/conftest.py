"""Reading a batch back by the definition of its fields, and small tries to make batches of."""

import zlib

import numpy as np
import pytest

from cft_jax.text.trie import grow_forest, token_matrix

END = 90


def _forest(*spaces):
    """A forest of spaces given as {token sequence: probability}."""
    sequences = [sequence for space in spaces for sequence in space]
    tokens, lengths = token_matrix(sequences)
    return grow_forest(
        tokens,
        lengths,
        np.repeat(np.arange(len(spaces)), [len(space) for space in spaces]),
        np.array([probability for space in spaces for probability in space.values()], dtype=np.float64),
        terminator_id=END,
        describe=lambda row: f"value {row}",
    )


def _steps(batch, prompts):
    """(row, prefix, weight, {token: probability}) of every step, from what its query can see."""
    found = []
    for row, prompt in enumerate(prompts):
        for step in np.flatnonzero(batch.step_weight[row] > 0):
            query = batch.step_index[row, step]
            keys = np.flatnonzero((np.arange(query + 1) <= query) & (query < batch.until[row, : query + 1]))
            tokens = batch.tokens[row, keys]
            assert tokens[: prompt.size].tolist() == prompt.tolist()
            assert batch.positions[row, keys].tolist() == list(range(keys.size))
            entries = (batch.target_step[row] == step) & (batch.target_probs[row] > 0)
            targets = dict(
                zip(batch.target_ids[row, entries].tolist(), batch.target_probs[row, entries].tolist(), strict=True)
            )
            found.append((row, tuple(tokens[prompt.size :].tolist()), float(batch.step_weight[row, step]), targets))
    return found


def _loss(steps, row_weight):
    """The loss of a model whose surprise at a token after a prefix is an arbitrary fixed number."""

    def surprise(prefix, token):
        return zlib.crc32(repr((prefix, token)).encode()) / 2**32

    total = sum(
        weight * sum(q * surprise(prefix, c) for c, q in targets.items()) for _, prefix, weight, targets in steps
    )
    return total / float(np.sum(row_weight))


@pytest.fixture
def forest_of():
    """Makes a `Forest` of spaces given as {token sequence: probability}; the terminator is 90."""
    return _forest


@pytest.fixture
def steps_of():
    """Reads a batch's steps back: (row, prefix, weight, {token: probability}); takes the batch and its prompts."""
    return _steps


@pytest.fixture
def loss_of():
    """The loss of such steps for one fixed imaginary model; takes the steps and the rows' weights."""
    return _loss
