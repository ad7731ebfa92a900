"""Laying examples out in rows: order, padding, packing, shared prefixes, and the arithmetic of the targets."""

import numpy as np

from cft_jax.data.batch import collate, padding_fraction, row_sizes


def test_prefixes_lie_depth_first_after_the_prompt(forest_of, examples_for, batch_of, spaces):
    rows = examples_for(forest_of(*spaces), [{0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0}, {0: 1.0, 1: 1.0}])
    batch = batch_of(rows, num_rows=4)
    # By hand: prefixes (1), (1, 2), (1, 2, 3), (4) after the prompt 50 51 52.
    assert batch.tokens[0].tolist() == [50, 51, 52, 1, 2, 3, 4, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 0, 0, 0]
    assert batch.subtree_end[0].tolist() == [7, 7, 7, 6, 6, 6, 7, 0, 0, 0]
    assert batch.target_index[0].tolist() == [2, 3, 4, 5, 6, 0]
    # The empty string's row is its prompt alone, and its only step is at the prompt's last token.
    assert batch.subtree_end[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert batch.target_weight[1].tolist() == [1, 0, 0, 0, 0, 0]
    # By hand: (7), (7, 8), (7, 8, 9), (7, 8, 9, 7), (7, 8, 9, 8) after a prompt of five.
    assert batch.positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert batch.subtree_end[2].tolist() == [10, 10, 10, 10, 10, 10, 10, 10, 9, 10]
    assert not batch.subtree_end[3].any() and batch.row_weight[3] == 0
    assert padding_fraction(batch) == 1 - (7 + 1 + 10) / (4 * 10)


def test_padding_has_no_weight_and_steps_ascend(forest_of, examples_for, batch_of, spaces):
    rows = examples_for(forest_of(*spaces), [{0: 1.0}, {0: 1.0}, {0: 1.0}])
    batch = batch_of(rows, num_rows=5, shape=(16, 8, 32))
    assert (np.diff(batch.target_position, axis=1) >= 0).all()
    for row in range(5):
        num_steps = int((batch.target_weight[row] > 0).sum())
        assert (batch.target_weight[row, num_steps:] == 0).all()
        sums = np.bincount(batch.target_position[row], weights=batch.target_probs[row], minlength=8)
        np.testing.assert_allclose(sums, np.arange(8) < num_steps, atol=1e-6)
    assert batch.row_weight.tolist() == [1, 1, 1, 0, 0]
    assert [array.dtype.name for array in batch] == [*["int32"] * 4, "float32", "int32", "int32", "float32", "float32"]


def test_targets_are_clamped_in_double_precision(forest_of, examples_for, batch_of, prompts):
    forest = forest_of({(1,): 1 - 1e-12, (2,): 1e-12, (3,): 0.0})
    rows = examples_for(forest, [{0: 1.0}], prompts=prompts[:1])
    epsilon = 1e-3
    clamped = np.array([1 - 1e-12, epsilon, epsilon])
    expected = (clamped / clamped.sum()).astype(np.float32)
    batch = batch_of(rows, epsilon=epsilon)
    assert batch.target_ids[0, :3].tolist() == [1, 2, 3]
    assert batch.target_probs[0, :3].tolist() == expected.tolist()
    assert batch_of(rows, epsilon=None).target_probs[0, :3].tolist() == [1.0, np.float32(1e-12), 0.0]


def test_several_blocks_in_a_row_are_the_same_steps(forest_of, examples_for, batch_of, steps_of, spaces, prompts):
    examples = examples_for(forest_of(*spaces), [{0: 1.0, 2: 1.0}, {1: 1.0}, {0: 1.0, 2: 1.0}])
    apart = steps_of(batch_of(examples), prompts)
    packed = batch_of(examples, rows=[1, 0, 0], num_rows=3)
    assert sorted(map(repr, steps_of(packed, prompts))) == sorted(map(repr, apart))
    # By hand: the second example's 1 + 2 tokens come before the third's 5 + 5.
    assert packed.subtree_end[0].tolist() == [3, 3, 3, 13, 13, 13, 13, 13, 13, 12, 12, 12, 13]
    assert packed.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 6]
    assert packed.row_weight.tolist() == [2, 1, 0]


def test_a_shared_prefix_is_left_out_but_counted(forest_of, examples_for, batch_of, steps_of, spaces):
    prompts = [np.array([40, 41, *ids], dtype=np.int32) for ids in ([50], [60, 61], [70])]
    examples = examples_for(forest_of(*spaces), [{0: 1.0}, {0: 1.0}, {0: 1.0, 1: 1.0}], prompts=prompts)
    whole, rest = batch_of(examples), batch_of(examples, shared=2)
    assert steps_of(rest, prompts, shared=2) == steps_of(whole, prompts)
    assert rest.tokens.shape[1] == whole.tokens.shape[1] - 2


def test_some_of_the_rows_are_the_same_as_in_the_whole(forest_of, examples_for, spaces):
    examples = examples_for(forest_of(*spaces), [{0: 1.0, 2: 1.0}, {1: 1.0}, {0: 1.0, 2: 1.0}])
    rows = np.array([0, 1, 1])

    def rows_between(first, last):
        mine = np.flatnonzero((rows >= first) & (rows < last))
        shape = (24, 12, 32)
        return collate(examples, mine, rows[mine] - first, num_rows=last - first, shape=shape, epsilon=1e-8, shared=0)

    whole, parts = rows_between(0, 4), [rows_between(0, 1), rows_between(1, 3), rows_between(3, 4)]
    for name, array in whole._asdict().items():
        np.testing.assert_array_equal(array, np.concatenate([getattr(part, name) for part in parts]), err_msg=name)


def test_a_row_needs_what_its_blocks_need_together():
    assert row_sizes(np.array([[3, 1, 5], [4, 1, 1], [2, 9, 1]]), np.array([0, 1, 0])).tolist() == [5, 10, 6]
