"""Hard targets: cross-entropy on drawn strings."""

import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array, Float, Int

IGNORED_LABEL = -100


def hard_target_loss(
    logits: Float[Array | np.ndarray, "B L V"],
    labels: Int[Array | np.ndarray, "B L"],
) -> Float[Array, ""]:
    """Mean cross-entropy of the next token over all scored positions of the batch, in float32.

    The shift happens here: the logits at position t predict the label at t + 1, so the label at position 0 is never
    scored. Training uses the fused form (`cft_jax.objectives.head`), which gives the same numbers.

    Args:
      logits: the model's scores before the softmax, any floating dtype.
      labels: token ids; -100 is ignored.

    Returns:
      Nats per scored position; NaN with nothing to score.
    """
    scores = jnp.asarray(logits, jnp.float32)[:, :-1]
    following = jnp.asarray(labels)[:, 1:]
    scored = following != IGNORED_LABEL
    chosen = jnp.take_along_axis(scores, jnp.where(scored, following, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(scored, logsumexp(scores, axis=-1) - chosen, 0.0)
    count = scored.sum()
    return jnp.where(count > 0, losses.sum() / jnp.maximum(count, 1), jnp.nan)
