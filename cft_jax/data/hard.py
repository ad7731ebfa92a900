"""Blocks of hard targets: strings drawn from any spaces; only what is drawn is written and tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from cft_jax.data.blocks import TrieExamples, examples_of_strings
from cft_jax.data.spaces import SpaceTable
from cft_jax.text.trie import grow_forest
from cft_jax.text.values import ValueEncoder


@dataclass(frozen=True, eq=False)
class DrawnStrings:
    """Strings drawn from output spaces, scored by the cross-entropy of their own tokens.

    A block with several strings holds their common beginnings once. Its target at a prefix is then the empirical
    distribution of the next token, and the step weighs as many strings as pass, which gives the same sum.

    Attributes:
      spaces: of every task.
      names: of every task, for errors.
      prompts: of every task.
      task_weights: what a string of each task weighs; 1 on average.
      encoder: of the tokenizer.
      terminator_id: the token that ends every value.
    """

    spaces: SpaceTable
    names: Sequence[str]
    prompts: Sequence[Int32[np.ndarray, "_"]]
    task_weights: Float64[np.ndarray, "G"]
    encoder: ValueEncoder
    terminator_id: int

    def blocks(self, tasks: Int64[np.ndarray, "B"], uniforms: Float64[np.ndarray, "B M"]) -> TrieExamples:
        """A block per task with as many drawn strings as there are uniform numbers.

        Raises:
          UserError: two drawn values of a task have the same tokens, or one contains the terminator.
        """
        drawn = np.sort(self.spaces.draw(tasks, uniforms), axis=1)
        is_new = np.ones(drawn.shape, dtype=bool)
        is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        distinct = np.flatnonzero(is_new)
        counts = np.diff(np.append(distinct, drawn.size)).astype(np.float64)
        block, codes = distinct // drawn.shape[1], drawn.ravel()[distinct]
        tokens, lengths = self.spaces.encode(self.encoder, tasks[block], codes)
        forest = grow_forest(
            tokens,
            lengths,
            block,
            counts / drawn.shape[1],
            terminator_id=self.terminator_id,
            describe=lambda index: self._describe(int(tasks[block[index]]), int(codes[index])),
        )
        return examples_of_strings(
            forest,
            [self.prompts[task] for task in tasks.tolist()],
            np.arange(tasks.size),
            block,
            np.arange(block.size) - forest.leaf_starts[block],
            counts * self.task_weights[tasks][block],
            np.bincount(block, weights=counts * (lengths + 1), minlength=tasks.size),
            per_position=False,
        )

    def _describe(self, task: int, code: int) -> str:
        return f"task {self.names[task]}: value {self.spaces.write(task, code)!r}"
