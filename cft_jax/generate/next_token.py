"""The model's whole next-token distribution after a prompt."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from cft_jax.generate.prefill import bucket, check_prompts
from cft_jax.generate.split_model import SplitModel
from cft_jax.sharding.rules import constrain

# Prompts in one forward pass, for each of the mesh's shards of the batch.
_ROWS = 16


def next_token_log_probs(
    split: SplitModel, prompts: Sequence[Sequence[int]], *, vocab_size: int, shards: int = 1
) -> Float32[np.ndarray, "P V"]:
    """Log-probabilities of every token after each prompt, at temperature 1; natural logarithms, computed in float32.

    Args:
      split: the model.
      prompts: token ids.
      vocab_size: of the model.
      shards: of the mesh along the batch.

    Raises:
      UserError: a prompt is empty, or holds a token that the model does not have.
    """
    check_prompts(prompts, vocab_size)
    found = np.zeros((len(prompts), vocab_size), np.float32)
    lengths: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lengths.setdefault(bucket(len(prompt), least=32), []).append(index)
    rows = _ROWS * shards
    for length, indices in lengths.items():
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            tokens, sizes = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
            for row, index in enumerate(chosen):
                sizes[row] = len(prompts[index])
                tokens[row, : sizes[row]] = prompts[index]
            found[chosen] = np.asarray(_last_log_probs(split, tokens, sizes))[: len(chosen)]
    return found


@jax.jit
def _last_log_probs(split: SplitModel, tokens: Int[Array, "B T"], sizes: Int[Array, "B"]) -> Float[Array, "B V"]:
    model = split.merge()
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    subtree_end = jnp.where(positions < sizes[:, None], sizes[:, None], 0)
    hidden, _ = model.hidden(tokens, positions, subtree_end)
    last = jnp.take_along_axis(hidden, (sizes - 1)[:, None, None], axis=1)[:, 0]
    return constrain(jax.nn.log_softmax(model.logits(last), axis=-1), (None, None), model.mesh)
