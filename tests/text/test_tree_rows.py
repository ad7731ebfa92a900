"""Trees cut into rows, packed, and padded: by hand, and against the definition of what a token sees."""

import numpy as np
import pytest

from cft_jax.text.tree_rows import TokenTree, bucket, cut_tree, first_fit, padded_rows, ranges

# By hand: 0 -> 1 -> 2 -> 3, 1 -> 4, 0 -> 5 -> 6.
SUBTREE_END = np.array([7, 5, 4, 4, 5, 7, 7])


def paths(subtree_end, nodes):
    """Every node with all above it, named by what `nodes` calls them."""
    return {tuple(nodes[j] for j in range(i + 1) if subtree_end[j] > i) for i in range(len(nodes))}


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8])
def test_every_node_is_once_below_all_its_ancestors(length):
    rows = list(cut_tree(SUBTREE_END, length))
    assert all(row.nodes.size <= length for row in rows)
    own = np.concatenate([row.nodes[row.num_ancestors :] for row in rows])
    assert own.tolist() == list(range(7))
    found = set().union(*(paths(row.subtree_end, row.nodes.tolist()) for row in rows))
    assert found == paths(SUBTREE_END, range(7))
    assert all(row.subtree_end.max() <= row.nodes.size for row in rows)


def test_a_cut_by_hand():
    rows = [(row.nodes.tolist(), row.num_ancestors, row.subtree_end.tolist()) for row in cut_tree(SUBTREE_END, 4)]
    assert rows == [
        ([0, 1, 2, 3], 0, [4, 4, 4, 4]),
        ([0, 1, 4, 5], 2, [4, 3, 3, 4]),
        ([0, 5, 6], 2, [3, 3, 3]),
    ]


def test_packing_is_first_fit_of_the_longest_first():
    # By hand: 12 is too long for any row and gets its own; then 9 with 1, 6 with 4, 5 with 3.
    assert first_fit(np.array([3, 9, 5, 1, 6, 4, 12]), 10).tolist() == [3, 1, 3, 1, 2, 2, 0]
    assert first_fit(np.array([], dtype=np.int64), 10).size == 0


def test_trees_in_rows_by_hand():
    fork = TokenTree(
        np.array([7, 8, 9]), np.array([4, 5, 5]), np.array([3, 2, 3]), np.array([0, 0, 2]), np.array([8, 9, 1])
    )
    leaf = TokenTree(np.array([5]), np.array([0]), np.array([1]), np.array([0]), np.array([6]))
    arrays = padded_rows([[fork, leaf], [leaf]], num_rows=3, length=5)
    assert arrays["tokens"].tolist() == [[7, 8, 9, 5, 0], [5, 0, 0, 0, 0], [0] * 5]
    assert arrays["positions"].tolist() == [[4, 5, 5, 0, 0], [0] * 5, [0] * 5]
    assert arrays["subtree_end"].tolist() == [[3, 2, 3, 4, 0], [1, 0, 0, 0, 0], [0] * 5]
    assert arrays["queries"][: arrays["num_queries"]].tolist() == [0, 2, 3, 5]
    count = int(arrays["num_targets"])
    assert arrays["target_query"][:count].tolist() == [0, 0, 1, 2, 3]
    assert arrays["target_ids"][:count].tolist() == [8, 9, 1, 6, 6]
    assert arrays["target_ids"].size == bucket(count, least=30)


def test_ranges():
    assert ranges(np.array([3, 0, 9]), np.array([2, 0, 3])).tolist() == [3, 4, 9, 10, 11]
