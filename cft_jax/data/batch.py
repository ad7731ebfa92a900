"""What a train step consumes: rows of tokens, the positions that predict, and their targets.

Rows of one batch are padded to one shape, and batches to few shapes, so that a run compiles its step only a few times.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from cft_jax.data.examples import TrieExamples
from cft_jax.text.tree_rows import ranges

# Rows, tokens, target positions and target entries.
Shape = tuple[int, int, int, int]

# Shares of the sampled steps that fit the shapes.
_QUANTILES = (0.5, 0.9, 1.0)
# A shape that saves less than this share of the tokens and target positions of the next one is not worth a compilation.
_WORTHWHILE = 0.15


class TargetBatch(NamedTuple):
    """B rows of T tokens with P target positions and K target entries each; NumPy here, the same arrays on devices.

    A row holds one or several examples, each a prompt and a part of its trie in depth-first order. Query i of a row
    sees key j exactly if j <= i < subtree_end[j]; for plain text, `subtree_end` is the length of the row. The target
    position of a prefix is its last token, that of the empty prefix the prompt's last; its hidden state predicts the
    next token.

    loss = Σ target_weight · L(position) / Σ row_weight, with L the divergence from the model's to the target
    distribution (soft targets) or the cross-entropy between them (hard targets).

    Attributes:
      tokens: token ids; 0 where padded.
      positions: of the prompt 0, 1, ...; of a prefix the last of the prompt plus the prefix's number of tokens.
      subtree_end: one past the last query that sees this key; 0 where padded.
      target_index: index in the row of each target position; 0 where padded.
      target_weight: weight of the target position; 0 where padded.
      target_position: which of the P target positions a target entry belongs to, ascending; the last where padded.
      target_ids: token id of the entry.
      target_probs: its probability, of every real target position summing to 1; 0 where padded.
      row_weight: what the row counts in the mean: its strings (path, paths), 1 for a prompt (exact), its scored
        tokens (hard); 0 where padded.
    """

    tokens: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    subtree_end: Int32[np.ndarray, "B T"]
    target_index: Int32[np.ndarray, "B P"]
    target_weight: Float32[np.ndarray, "B P"]
    target_position: Int32[np.ndarray, "B K"]
    target_ids: Int32[np.ndarray, "B K"]
    target_probs: Float32[np.ndarray, "B K"]
    row_weight: Float32[np.ndarray, "B"]


def padding_fraction(batch: TargetBatch) -> float:
    """Share of the batch's tokens that are padding."""
    return float(np.mean(np.asarray(batch.subtree_end) == 0))


def row_sizes(sizes: Int64[np.ndarray, "B 3"], rows: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "3"]:
    """The largest sizes of any row when examples of these sizes go to these rows."""
    sums = np.zeros((int(rows.max(initial=0)) + 1, 3), dtype=np.int64)
    np.add.at(sums, rows, sizes)
    return sums.max(axis=0)


def collate(
    examples: TrieExamples,
    chosen: Int64[np.ndarray, "C"],
    rows: Int64[np.ndarray, "C"],
    *,
    num_rows: int,
    shape: tuple[int, int, int],
    epsilon: float | None,
    shared: int,
) -> TargetBatch:
    """Lays examples out in rows and pads the rows to one shape.

    Args:
      examples: the examples.
      chosen: numbers of the examples to take.
      rows: the row of each, ascending; examples of a row follow each other.
      num_rows: B; rows without an example are padding.
      shape: T, P and K, none smaller than any row needs.
      epsilon: floor of the target probabilities of a position before they are divided by their sum; None leaves them.
      shared: how many first tokens of every prompt are left out, because the model is given them once for all rows;
        positions count them.
    """
    prompts = [examples.prompts[example][shared:] for example in chosen.tolist()]
    prompt_lengths = np.array([prompt.size for prompt in prompts], dtype=np.int64)
    num_nodes = examples.node_starts[chosen + 1] - examples.node_starts[chosen]
    # The empty prefix is the prompt's last token.
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
    nodes = ranges(examples.node_starts[chosen], num_nodes)
    root = (begins + prompt_lengths - 1)[owner]
    index = root + nodes - examples.node_starts[chosen][owner]
    below = np.flatnonzero(examples.depth[nodes] > 0)
    where = rows[owner[below]], index[below]
    tokens[where] = examples.token[nodes[below]]
    positions[where] = shared + (prompt_lengths - 1)[owner[below]] + examples.depth[nodes[below]]
    subtree_end[where] = root[below] + examples.subtree_end[nodes[below]]

    counted = np.flatnonzero(examples.weight[nodes] > 0)
    targets = _targets(examples, nodes[counted], rows[owner[counted]], index[counted], (num_rows, *shape[1:]), epsilon)
    row_weight = np.bincount(rows, weights=examples.mean_weight[chosen], minlength=num_rows).astype(np.float32)
    return TargetBatch(tokens, positions, subtree_end, **targets, row_weight=row_weight)


def _targets(
    examples: TrieExamples,
    nodes: np.ndarray,
    rows: np.ndarray,
    indices: np.ndarray,
    shape: tuple[int, int, int],
    epsilon: float | None,
) -> dict[str, np.ndarray]:
    """The target arrays of a batch [B, P] and [B, K], from the counted prefixes, their rows (ascending) and indices."""
    num_rows, num_positions, num_entries = shape
    target_index = np.zeros((num_rows, num_positions), dtype=np.int32)
    target_weight = np.zeros((num_rows, num_positions), dtype=np.float32)
    target_position = np.full((num_rows, num_entries), num_positions - 1, dtype=np.int32)
    target_ids = np.zeros((num_rows, num_entries), dtype=np.int32)
    target_probs = np.zeros((num_rows, num_entries), dtype=np.float32)
    if nodes.size:
        position = _rank(rows, num_rows)
        target_index[rows, position] = indices
        target_weight[rows, position] = examples.weight[nodes]
        starts = examples.target_starts[nodes]
        counts = examples.target_starts[nodes + 1] - starts
        entries = ranges(starts, counts)
        entry_rows = np.repeat(rows, counts)
        where = entry_rows, _rank(entry_rows, num_rows)
        target_position[where] = np.repeat(position, counts)
        target_ids[where] = examples.target_ids[entries]
        probabilities = examples.target_probs[entries]
        if epsilon is not None:
            probabilities = np.maximum(probabilities, epsilon)
            sums = np.add.reduceat(probabilities, np.cumsum(counts) - counts)
            probabilities /= np.repeat(sums, counts)
        target_probs[where] = probabilities
    return {
        "target_index": target_index,
        "target_weight": target_weight,
        "target_position": target_position,
        "target_ids": target_ids,
        "target_probs": target_probs,
    }


def _rank(groups: np.ndarray, num_groups: int) -> np.ndarray:
    """How many entries of the same group precede each entry; `groups` ascend."""
    sizes = np.bincount(groups, minlength=num_groups)
    return np.arange(groups.size) - (np.cumsum(sizes) - sizes)[groups]


def shape_levels(sizes: Int64[np.ndarray, "N 4"], row_multiple: int) -> tuple[Shape, ...]:
    """One to three shapes for steps that need these sizes.

    Args:
      sizes: of sampled steps: rows, and the largest tokens, target positions and target entries of any row.
      row_multiple: what the number of rows must be a multiple of.

    Returns:
      Shapes of ascending size; the last fits all sampled steps.
    """
    levels: list[Shape] = []
    for quantile in sorted(_QUANTILES, reverse=True):
        shape = _rounded(np.quantile(sizes, quantile, axis=0, method="higher"), row_multiple)
        if (
            not levels
            or 1 - shape[0] * max(shape[1] / levels[0][1], shape[2] / levels[0][2]) / levels[0][0] > _WORTHWHILE
        ):
            levels.insert(0, shape)
    return tuple(levels)


def fitting_shape(size: Int64[np.ndarray, "4"], levels: tuple[Shape, ...], row_multiple: int) -> Shape:
    """The smallest level that fits; beyond the last, a size grows by quarters until it does."""
    for level in levels:
        if (size <= np.array(level)).all():
            return level
    top = np.array(levels[-1])
    growth = np.ceil(np.maximum(size / top - 1, 0) * 4) / 4
    return _rounded(top * (1 + growth), row_multiple)


def _rounded(size: np.ndarray, row_multiple: int) -> Shape:
    multiples = np.array([row_multiple, 8, 2, 64])
    rows, tokens, positions, targets = (np.ceil(np.maximum(size, 1) / multiples) * multiples).astype(int).tolist()
    return rows, tokens, positions, targets
