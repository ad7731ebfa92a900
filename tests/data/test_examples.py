"""Examples read back from batches by the definition of a batch's fields: prefixes, weights, targets, splitting."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cft_jax.data.examples import examples_of_tries, joined_examples, split_examples

END = 90


def expected_steps(space, chosen, *, per_position):
    """{prefix: (weight, targets)} of chosen strings, from the definition."""
    sequences = list(space)
    found = {}
    for number, weight in chosen.items():
        ended = (*sequences[number], END)
        for length in range(len(ended)):
            prefix = ended[:length]
            share = weight / len(ended) if per_position else weight
            targets = {}
            for sequence, probability in space.items():
                full = (*sequence, END)
                if full[:length] == prefix:
                    targets[full[length]] = targets.get(full[length], 0.0) + probability
            total = sum(targets.values())
            targets = {token: mass / total for token, mass in targets.items()}
            found[prefix] = (found.get(prefix, (0.0,))[0] + share, targets)
    return found


@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize(
    "strings",
    [
        [{0: 1.0}, {1: 1.0}, {2: 1.0}],
        [{2: 1.0, 0: 2.0, 3: 1.0}, {0: 3.0}, {0: 1.0, 1: 1.0}],
        [{0: 0.5, 1: 0.125, 2: 0.25, 3: 0.125}, {0: 0.25, 1: 0.75}, {0: 0.1, 1: 0.2, 2: 0.7}],
    ],
    ids=["path", "paths", "exact"],
)
def test_rows_hold_what_the_definition_says(
    forest_of, examples_for, batch_of, steps_of, spaces, prompts, strings, per_position
):
    rows = examples_for(forest_of(*spaces), strings, per_position=per_position)
    steps = steps_of(batch_of(rows), prompts)
    for row, (space, chosen) in enumerate(zip(spaces, strings, strict=True)):
        found = {prefix: (weight, targets) for at, prefix, weight, targets in steps if at == row}
        expected = expected_steps(space, chosen, per_position=per_position)
        assert len(found) == sum(at == row for at, *_ in steps)
        assert sorted(found) == sorted(expected)
        for prefix, (weight, targets) in expected.items():
            assert found[prefix][0] == pytest.approx(weight, rel=1e-6)
            assert found[prefix][1] == pytest.approx(targets, rel=1e-6)


SPACE = st.dictionaries(
    st.lists(st.integers(0, 2), max_size=5).map(tuple), st.floats(0.01, 1.0), min_size=1, max_size=25
)


def normalised(space):
    total = sum(space.values())
    return {sequence: mass / total for sequence, mass in space.items()}


@given(SPACE.map(normalised), st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exact_is_the_mean_of_path(forest_of, examples_for, batch_of, steps_of, loss_of, prompts, space, per_position):
    forest, prompts = forest_of(space), prompts[:1]
    exact = batch_of(
        examples_for(forest, [dict(enumerate(space.values()))], per_position=per_position, prompts=prompts)
    )
    mean = 0.0
    for number, probability in enumerate(space.values()):
        path = batch_of(examples_for(forest, [{number: 1.0}], per_position=per_position, prompts=prompts))
        mean += probability * loss_of(steps_of(path, prompts), path.row_weight)
    assert loss_of(steps_of(exact, prompts), exact.row_weight) == pytest.approx(mean, rel=1e-5)


@given(SPACE.map(normalised), st.integers(1, 12))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_splitting_keeps_every_step_once(forest_of, examples_for, batch_of, steps_of, prompts, space, spare):
    rows = examples_for(forest_of(space), [dict(enumerate(space.values()))], prompts=prompts[:1])
    max_nodes = max(map(len, space)) + spare
    split = split_examples(rows, max_nodes)
    assert (split.sizes()[:, 0] <= prompts[0].size + max_nodes).all()
    assert (np.diff(split.node_starts) - 1 <= max_nodes).all()
    assert split.mean_weight.sum() == rows.mean_weight.sum()
    whole = sorted((step[1:3], sorted(step[3].items())) for step in steps_of(batch_of(rows), prompts[:1]))
    parts = sorted((step[1:3], sorted(step[3].items())) for step in steps_of(batch_of(split), prompts[:1]))
    assert parts == whole
    if len(rows.token) - 1 <= max_nodes:
        assert len(split) == 1


def test_splitting_needs_room_for_the_longest_string(forest_of, examples_for, spaces):
    rows = examples_for(forest_of(*spaces), [{0: 1.0}, {1: 1.0}, {0: 1.0}])
    with pytest.raises(ValueError, match="length=4 has no room for a node and its 4 ancestors"):
        split_examples(rows, 3)


def test_whole_tries_with_given_weights(forest_of, examples_for, batch_of, steps_of, spaces, prompts):
    forest = forest_of(*spaces)
    tries = [forest.trie(index) for index in range(3)]
    weights = [np.arange(1.0, trie.num_prefixes + 1) for trie in tries]
    rows = examples_of_tries(tries, prompts, weights, np.ones(3))
    steps = steps_of(batch_of(rows), prompts)
    assert [weight for row, _, weight, _ in steps if row == 2] == weights[2].tolist()
    everything = examples_for(forest, [dict.fromkeys(range(len(space)), 1.0) for space in spaces])
    expected = steps_of(batch_of(everything), prompts)
    assert [(row, prefix, targets) for row, prefix, _, targets in steps] == [
        (row, prefix, targets) for row, prefix, _, targets in expected
    ]


def test_rows_of_two_sources_keep_the_tasks_order(forest_of, examples_for, batch_of, spaces, prompts):
    strings = [{0: 1.0, 2: 1.0}, {1: 1.0}, {0: 1.0, 2: 1.0}]
    whole = examples_for(forest_of(*spaces), strings)
    outer = examples_for(forest_of(spaces[0], spaces[2]), [strings[0], strings[2]], prompts=[prompts[0], prompts[2]])
    inner = examples_for(forest_of(spaces[1]), [strings[1]], prompts=prompts[1:2])
    joined = joined_examples([outer, inner], [np.array([0, 2]), np.array([1])])
    for ours, theirs in itertools.zip_longest(batch_of(joined), batch_of(whole)):
        np.testing.assert_array_equal(ours, theirs)
    assert joined.task.tolist() == [0, 1, 2]
