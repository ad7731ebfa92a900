"""Reading a batch back by the definition of its fields, and small tries to make batches of."""

import zlib

import numpy as np
import pytest

from cft_jax.data.batch import collate, row_sizes
from cft_jax.data.examples import examples_of_strings
from cft_jax.text.trie import grow_forest, token_matrix

END = 90
PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([50, 51, 52], [60], [70, 71, 72, 73, 74])]
SPACES = (
    {(1, 2): 0.5, (1,): 0.125, (1, 2, 3): 0.25, (4,): 0.125},
    {(): 0.25, (5, 6): 0.75},
    {(7, 8, 9, 7): 0.1, (7, 8, 9, 8): 0.2, (7, 9): 0.7},
)


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


def _examples(forest, strings, *, per_position=True, prompts=PROMPTS):
    return examples_of_strings(
        forest,
        prompts,
        np.arange(len(strings)),
        np.repeat(np.arange(len(strings)), [len(chosen) for chosen in strings]),
        np.array([number for chosen in strings for number in chosen]),
        np.array([weight for chosen in strings for weight in chosen.values()], dtype=np.float64),
        np.ones(len(strings)),
        per_position=per_position,
    )


def _batch(examples, *, rows=None, epsilon: float | None = 1e-8, shared=0, num_rows=None, shape=None):
    """A batch of all examples, by default each in a row of its own and padded no further than needed."""
    rows = np.arange(len(examples)) if rows is None else np.array(rows)
    chosen = np.argsort(rows, kind="stable")
    sizes = row_sizes(examples.sizes() - [shared, 0, 0], rows)
    return collate(
        examples,
        chosen,
        rows[chosen],
        num_rows=num_rows or int(rows.max()) + 1,
        shape=shape or tuple(sizes.tolist()),
        epsilon=epsilon,
        shared=shared,
    )


def _steps(batch, prompts, shared=0):
    """(prompt, prefix, weight, {token: probability}) of every step, from what its query can see.

    No prompt may begin another, so that what a query sees tells which prompt it belongs to.
    """
    found = []
    for row, step in np.argwhere(batch.target_weight > 0):
        query = batch.target_index[row, step]
        keys = np.flatnonzero(query < batch.subtree_end[row, : query + 1])
        tokens = tuple(batch.tokens[row, keys].tolist())
        (prompt,) = {
            number for number, ids in enumerate(prompts) if tokens[: ids.size - shared] == tuple(ids[shared:].tolist())
        }
        assert batch.positions[row, keys].tolist() == list(range(shared, shared + keys.size))
        entries = (batch.target_position[row] == step) & (batch.target_probs[row] > 0)
        targets = dict(
            zip(batch.target_ids[row, entries].tolist(), batch.target_probs[row, entries].tolist(), strict=True)
        )
        prefix = tokens[prompts[prompt].size - shared :]
        found.append((prompt, prefix, float(batch.target_weight[row, step]), targets))
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
def spaces():
    """Three spaces as {token sequence: probability}: values that begin others, an empty one, long common prefixes."""
    return SPACES


@pytest.fixture
def prompts():
    """A prompt for each of the three spaces."""
    return PROMPTS


@pytest.fixture
def examples_for():
    """Makes an example per trie of a forest with strings given as {string number: weight}; each example counts 1."""
    return _examples


@pytest.fixture
def batch_of():
    """Makes a `TargetBatch` of all given examples."""
    return _batch


@pytest.fixture
def steps_of():
    """Reads a batch's steps back: (prompt, prefix, weight, {token: probability}); takes the batch and the prompts."""
    return _steps


@pytest.fixture
def loss_of():
    """The loss of such steps for one fixed imaginary model; takes the steps and the rows' weights."""
    return _loss
