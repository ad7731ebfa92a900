"""What a train step consumes: rows of tokens, the positions that predict, and their targets."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32


class TargetBatch(NamedTuple):
    """B rows of T tokens with P steps and K target entries each; NumPy here, the same tree of arrays on devices.

    A row holds one or several blocks, each a prompt and a part of its trie in depth-first order. Query i of a row
    sees key j exactly if j <= i < subtree_end[j]; for plain text, `subtree_end` is the length of the row. The step at
    a prefix predicts the next token from the hidden state at the prefix's last token, the step of the empty prefix
    from the prompt's last.

    loss = Σ target_weight · L(step) / Σ row_weight, with L the divergence from the model's to the target distribution
    (soft targets) or the cross-entropy between them (hard targets).

    Attributes:
      tokens: token ids; 0 where padded.
      positions: of the prompt 0, 1, ...; of a prefix the last of the prompt plus the prefix's number of tokens.
      subtree_end: one past the last query that sees this key; 0 where padded.
      target_index: position in the row whose hidden state predicts the step; 0 where padded.
      target_weight: weight of the step; 0 where padded.
      target_position: the step that a target entry belongs to, ascending; the last where padded.
      target_ids: token id of the entry.
      target_probs: its probability, of every real step summing to 1; 0 where padded.
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
    """Share of the batch's token places that are padding."""
    return float(np.mean(np.asarray(batch.subtree_end) == 0))
