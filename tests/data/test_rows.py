"""Rows read back by the definition of a batch's fields: which prefixes they hold, weights, targets, splitting."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cft_jax.data.batch import padding_fraction
from cft_jax.data.rows import collate, joined_rows, rows_of_strings, rows_of_tries, split_rows

END = 90
PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([50, 51, 52], [60], [70, 71, 72, 73, 74])]
SPACES = (
    {(1, 2): 0.5, (1,): 0.125, (1, 2, 3): 0.25, (4,): 0.125},
    {(): 0.25, (5, 6): 0.75},
    {(7, 8, 9, 7): 0.1, (7, 8, 9, 8): 0.2, (7, 9): 0.7},
)
EPSILON = 1e-8


def rows_for(forest, strings, *, per_step=True, prompts=PROMPTS):
    """Rows with these strings, {string number: weight} for each trie, each counting 1."""
    return rows_of_strings(
        forest,
        prompts,
        np.arange(len(strings)),
        np.repeat(np.arange(len(strings)), [len(chosen) for chosen in strings]),
        np.array([number for chosen in strings for number in chosen]),
        np.array([weight for chosen in strings for weight in chosen.values()], dtype=np.float64),
        np.ones(len(strings)),
        per_step=per_step,
    )


def batch_of(rows, *, epsilon: float | None = EPSILON, num_rows=None):
    shape = tuple(rows.sizes().max(axis=0).tolist())
    return collate(rows, 0, len(rows), num_rows=num_rows or len(rows), shape=shape, epsilon=epsilon)


def expected_steps(space, chosen, *, per_step):
    """{prefix: (weight, targets)} of chosen strings, from the definition."""
    sequences = list(space)
    found = {}
    for number, weight in chosen.items():
        ended = (*sequences[number], END)
        for length in range(len(ended)):
            prefix = ended[:length]
            share = weight / len(ended) if per_step else weight
            targets = {}
            for sequence, probability in space.items():
                full = (*sequence, END)
                if full[:length] == prefix:
                    targets[full[length]] = targets.get(full[length], 0.0) + probability
            total = sum(targets.values())
            targets = {token: mass / total for token, mass in targets.items()}
            found[prefix] = (found.get(prefix, (0.0,))[0] + share, targets)
    return found


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize(
    "strings",
    [
        [{0: 1.0}, {1: 1.0}, {2: 1.0}],
        [{2: 1.0, 0: 2.0, 3: 1.0}, {0: 3.0}, {0: 1.0, 1: 1.0}],
        [{0: 0.5, 1: 0.125, 2: 0.25, 3: 0.125}, {0: 0.25, 1: 0.75}, {0: 0.1, 1: 0.2, 2: 0.7}],
    ],
    ids=["path", "paths", "exact"],
)
def test_rows_hold_what_the_definition_says(forest_of, steps_of, strings, per_step):
    rows = rows_for(forest_of(*SPACES), strings, per_step=per_step)
    steps = steps_of(batch_of(rows), PROMPTS)
    for row, (space, chosen) in enumerate(zip(SPACES, strings, strict=True)):
        found = {prefix: (weight, targets) for at, prefix, weight, targets in steps if at == row}
        expected = expected_steps(space, chosen, per_step=per_step)
        assert len(found) == sum(at == row for at, *_ in steps)
        assert sorted(found) == sorted(expected)
        for prefix, (weight, targets) in expected.items():
            assert found[prefix][0] == pytest.approx(weight, rel=1e-6)
            assert found[prefix][1] == pytest.approx(targets, rel=1e-6)


def test_prefixes_lie_depth_first_after_the_prompt(forest_of):
    rows = rows_for(forest_of(*SPACES), [{0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0}, {0: 1.0, 1: 1.0}])
    batch = batch_of(rows, num_rows=4)
    # By hand: prefixes (1), (1, 2), (1, 2, 3), (4) after the prompt 50 51 52.
    assert batch.tokens[0].tolist() == [50, 51, 52, 1, 2, 3, 4, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 0, 0, 0]
    assert batch.until[0].tolist() == [7, 7, 7, 6, 6, 6, 7, 0, 0, 0]
    assert batch.step_index[0].tolist() == [2, 3, 4, 5, 6, 0]
    # The empty string's row is its prompt alone, and its only step is at the prompt's last token.
    assert batch.until[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert batch.step_weight[1].tolist() == [1, 0, 0, 0, 0, 0]
    # By hand: (7), (7, 8), (7, 8, 9), (7, 8, 9, 7), (7, 8, 9, 8) after a prompt of five.
    assert batch.positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert batch.until[2].tolist() == [10, 10, 10, 10, 10, 10, 10, 10, 9, 10]
    assert not batch.until[3].any() and batch.row_weight[3] == 0
    assert padding_fraction(batch) == 1 - (7 + 1 + 10) / (4 * 10)


def test_padding_has_no_weight_and_steps_ascend(forest_of):
    rows = rows_for(forest_of(*SPACES), [{0: 1.0}, {0: 1.0}, {0: 1.0}])
    batch = collate(rows, 0, 3, num_rows=5, shape=(16, 8, 32), epsilon=EPSILON)
    assert (np.diff(batch.target_step, axis=1) >= 0).all()
    for row in range(5):
        num_steps = int((batch.step_weight[row] > 0).sum())
        assert (batch.step_weight[row, num_steps:] == 0).all()
        sums = np.bincount(batch.target_step[row], weights=batch.target_probs[row], minlength=8)
        np.testing.assert_allclose(sums, np.arange(8) < num_steps, atol=1e-6)
    assert batch.row_weight.tolist() == [1, 1, 1, 0, 0]
    assert [array.dtype.name for array in batch] == [*["int32"] * 4, "float32", "int32", "int32", "float32", "float32"]


def test_targets_are_clamped_in_double_precision(forest_of):
    forest = forest_of({(1,): 1 - 1e-12, (2,): 1e-12, (3,): 0.0})
    rows = rows_for(forest, [{0: 1.0}], prompts=PROMPTS[:1])
    epsilon = 1e-3
    clamped = np.array([1 - 1e-12, epsilon, epsilon])
    expected = (clamped / clamped.sum()).astype(np.float32)
    batch = batch_of(rows, epsilon=epsilon)
    assert batch.target_ids[0, :3].tolist() == [1, 2, 3]
    assert batch.target_probs[0, :3].tolist() == expected.tolist()
    assert batch_of(rows, epsilon=None).target_probs[0, :3].tolist() == [1.0, np.float32(1e-12), 0.0]


def test_a_part_of_the_rows_is_the_same_as_in_the_whole(forest_of):
    rows = rows_for(forest_of(*SPACES), [{0: 1.0, 2: 1.0}, {1: 1.0}, {0: 1.0, 2: 1.0}])
    shape = (16, 8, 32)
    whole = collate(rows, 0, 3, num_rows=4, shape=shape, epsilon=EPSILON)
    parts = [collate(rows, i, min(i + 2, 3), num_rows=2, shape=shape, epsilon=EPSILON) for i in (0, 2)]
    for name, array in whole._asdict().items():
        np.testing.assert_array_equal(array, np.concatenate([getattr(part, name) for part in parts]), err_msg=name)


SPACE = st.dictionaries(
    st.lists(st.integers(0, 2), max_size=5).map(tuple), st.floats(0.01, 1.0), min_size=1, max_size=25
)


def normalised(space):
    total = sum(space.values())
    return {sequence: mass / total for sequence, mass in space.items()}


@given(SPACE.map(normalised), st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exact_is_the_mean_of_path(forest_of, steps_of, loss_of, space, per_step):
    forest, prompts = forest_of(space), PROMPTS[:1]
    exact = batch_of(rows_for(forest, [dict(enumerate(space.values()))], per_step=per_step, prompts=prompts))
    mean = 0.0
    for number, probability in enumerate(space.values()):
        path = batch_of(rows_for(forest, [{number: 1.0}], per_step=per_step, prompts=prompts))
        mean += probability * loss_of(steps_of(path, prompts), path.row_weight)
    assert loss_of(steps_of(exact, prompts), exact.row_weight) == pytest.approx(mean, rel=1e-5)


@given(SPACE.map(normalised), st.integers(1, 12))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_splitting_keeps_every_step_once(forest_of, steps_of, space, spare):
    rows = rows_for(forest_of(space), [dict(enumerate(space.values()))], prompts=PROMPTS[:1])
    max_nodes = max(map(len, space)) + spare
    split = split_rows(rows, max_nodes)
    assert (split.sizes()[:, 0] <= PROMPTS[0].size + max_nodes).all()
    assert (np.diff(split.node_starts) - 1 <= max_nodes).all()
    assert split.row_weight.sum() == rows.row_weight.sum()
    whole = sorted((step[1:3], sorted(step[3].items())) for step in steps_of(batch_of(rows), PROMPTS[:1]))
    parts = sorted(
        (step[1:3], sorted(step[3].items())) for step in steps_of(batch_of(split), [PROMPTS[0]] * len(split))
    )
    assert parts == whole
    if len(rows.token) - 1 <= max_nodes:
        assert len(split) == 1


def test_splitting_needs_room_for_the_longest_string(forest_of):
    rows = rows_for(forest_of(*SPACES), [{0: 1.0}, {1: 1.0}, {0: 1.0}])
    with pytest.raises(ValueError, match="max_nodes=4 must be greater than 4"):
        split_rows(rows, 4)


def test_whole_tries_with_given_weights(forest_of, steps_of):
    forest = forest_of(*SPACES)
    tries = [forest.trie(index) for index in range(3)]
    weights = [np.arange(1.0, trie.num_prefixes + 1) for trie in tries]
    rows = rows_of_tries(tries, PROMPTS, weights, np.ones(3))
    steps = steps_of(batch_of(rows), PROMPTS)
    assert [weight for row, _, weight, _ in steps if row == 2] == weights[2].tolist()
    everything = rows_for(forest, [dict.fromkeys(range(len(space)), 1.0) for space in SPACES])
    expected = steps_of(batch_of(everything), PROMPTS)
    assert [(row, prefix, targets) for row, prefix, _, targets in steps] == [
        (row, prefix, targets) for row, prefix, _, targets in expected
    ]


def test_rows_of_two_sources_keep_the_tasks_order(forest_of):
    strings = [{0: 1.0, 2: 1.0}, {1: 1.0}, {0: 1.0, 2: 1.0}]
    whole = rows_for(forest_of(*SPACES), strings)
    outer = rows_for(forest_of(SPACES[0], SPACES[2]), [strings[0], strings[2]], prompts=[PROMPTS[0], PROMPTS[2]])
    inner = rows_for(forest_of(SPACES[1]), [strings[1]], prompts=PROMPTS[1:2])
    joined = joined_rows([outer, inner], [np.array([0, 2]), np.array([1])])
    for ours, theirs in itertools.zip_longest(batch_of(joined), batch_of(whole)):
        np.testing.assert_array_equal(ours, theirs)
    assert joined.task.tolist() == [0, 1, 2]
