"""From blocks to the padded arrays of a batch: one block to a row, or several packed into each."""

import numpy as np
from jaxtyping import Int64

from cft_jax.data.batch import TargetBatch
from cft_jax.data.blocks import TrieExamples
from cft_jax.text.tree_rows import ranges


def row_sizes(sizes: Int64[np.ndarray, "B 3"], rows: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "3"]:
    """The largest sizes of any row when blocks of these sizes go to these rows."""
    sums = np.zeros((int(rows.max(initial=0)) + 1, 3), dtype=np.int64)
    np.add.at(sums, rows, sizes)
    return sums.max(axis=0)


def collate(
    blocks: TrieExamples,
    chosen: Int64[np.ndarray, "C"],
    rows: Int64[np.ndarray, "C"],
    *,
    num_rows: int,
    shape: tuple[int, int, int],
    epsilon: float | None,
    shared: int,
) -> TargetBatch:
    """Places blocks in rows and pads the rows to one shape.

    Args:
      blocks: the blocks.
      chosen: numbers of the blocks to take.
      rows: the row of each, ascending; blocks of a row follow each other.
      num_rows: B; rows without a block are padding.
      shape: T, P and K, none smaller than any row needs.
      epsilon: floor of the target probabilities of a step before they are divided by their sum; None leaves them.
      shared: how many first tokens of every prompt are left out, because the model is given them once for all rows;
        positions count them.
    """
    prompts = [blocks.prompts[block][shared:] for block in chosen.tolist()]
    prompt_lengths = np.array([prompt.size for prompt in prompts], dtype=np.int64)
    num_nodes = blocks.node_starts[chosen + 1] - blocks.node_starts[chosen]
    # The empty prefix has its place at the prompt's last token.
    lengths = prompt_lengths + num_nodes - 1
    begins = np.cumsum(lengths) - lengths
    begins -= begins[np.searchsorted(rows, rows)]

    tokens, positions, subtree_end = np.zeros((3, num_rows, shape[0]), dtype=np.int32)
    owner = np.repeat(np.arange(chosen.size), prompt_lengths)
    at = ranges(np.zeros(chosen.size, dtype=np.int64), prompt_lengths)
    where = rows[owner], begins[owner] + at
    tokens[where] = np.concatenate([np.empty(0, dtype=np.int32), *prompts])
    positions[where] = shared + at
    subtree_end[where] = (begins + lengths)[owner]

    owner = np.repeat(np.arange(chosen.size), num_nodes)
    nodes = ranges(blocks.node_starts[chosen], num_nodes)
    root = (begins + prompt_lengths - 1)[owner]
    place = root + nodes - blocks.node_starts[chosen][owner]
    below = np.flatnonzero(blocks.depth[nodes] > 0)
    where = rows[owner[below]], place[below]
    tokens[where] = blocks.token[nodes[below]]
    positions[where] = shared + (prompt_lengths - 1)[owner[below]] + blocks.depth[nodes[below]]
    subtree_end[where] = root[below] + blocks.subtree_end[nodes[below]]

    counted = np.flatnonzero(blocks.weight[nodes] > 0)
    steps = _steps(blocks, nodes[counted], rows[owner[counted]], place[counted], num_rows, shape, epsilon)
    mean_weight = np.bincount(rows, weights=blocks.mean_weight[chosen], minlength=num_rows).astype(np.float32)
    return TargetBatch(tokens, positions, subtree_end, *steps, mean_weight)


_StepArrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _steps(
    blocks: TrieExamples,
    nodes: np.ndarray,
    rows: np.ndarray,
    places: np.ndarray,
    num_rows: int,
    shape: tuple[int, int, int],
    epsilon: float | None,
) -> _StepArrays:
    """The step and target arrays of a batch, from the counted prefixes, their rows (ascending) and places therein."""
    _, num_steps, num_targets = shape
    target_index = np.zeros((num_rows, num_steps), dtype=np.int32)
    target_weight = np.zeros((num_rows, num_steps), dtype=np.float32)
    target_position = np.full((num_rows, num_targets), num_steps - 1, dtype=np.int32)
    target_ids = np.zeros((num_rows, num_targets), dtype=np.int32)
    target_probs = np.zeros((num_rows, num_targets), dtype=np.float32)
    if nodes.size:
        step = _rank(rows, num_rows)
        target_index[rows, step] = places
        target_weight[rows, step] = blocks.weight[nodes]
        starts = blocks.target_starts[nodes]
        counts = blocks.target_starts[nodes + 1] - starts
        entries = ranges(starts, counts)
        entry_rows = np.repeat(rows, counts)
        where = entry_rows, _rank(entry_rows, num_rows)
        target_position[where] = np.repeat(step, counts)
        target_ids[where] = blocks.target_ids[entries]
        probabilities = blocks.target_probs[entries]
        if epsilon is not None:
            probabilities = np.maximum(probabilities, epsilon)
            sums = np.add.reduceat(probabilities, np.cumsum(counts) - counts)
            probabilities /= np.repeat(sums, counts)
        target_probs[where] = probabilities
    return target_index, target_weight, target_position, target_ids, target_probs


def _rank(groups: np.ndarray, num_groups: int) -> np.ndarray:
    """How many entries of the same group precede each entry; `groups` ascend."""
    sizes = np.bincount(groups, minlength=num_groups)
    return np.arange(groups.size) - (np.cumsum(sizes) - sizes)[groups]
