"""The paper's formulas, written plainly: what the fused loss of training is tested against, and a public reference.

Training never calls them: `fused_loss` gives the same numbers without logits over the whole vocabulary in memory.
"""

import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int

IGNORED_LABEL = -100


def soft_target_loss(
    logits: Float[Array | np.ndarray, "B P V"],
    target_ids: Int[Array | np.ndarray, "B P C"],
    target_probs: Float[Array | np.ndarray, "B P C"],
    target_mask: Bool[Array | np.ndarray, "B P C"],
    step_mask: Bool[Array | np.ndarray, "B P"],
    *,
    tau: float,
    epsilon: float,
) -> Float[Array, ""]:
    """KL(target ‖ softmax(logits / tau)), mean over the target positions of a row, then over rows (arXiv 2605.11845).

    The softmax runs over the whole vocabulary; targets are clamped at `epsilon` from below and renormalised. There is
    no factor tau². All arithmetic is float32.

    Args:
      logits: the model's scores before the softmax, any floating dtype.
      target_ids: token ids of the candidates of each position; any valid id where masked.
      target_probs: their probabilities; ignored where masked.
      target_mask: true at real candidates.
      step_mask: true at real target positions. One without any candidate has no target and is not counted either.
      tau: temperature of the model's softmax.
      epsilon: floor of the target probabilities before renormalising.

    Returns:
      Nats; NaN when no row has a target position.
    """
    scores = jnp.asarray(logits, jnp.float32) / tau
    log_probs = jnp.take_along_axis(scores, jnp.asarray(target_ids), axis=-1) - logsumexp(scores, -1, keepdims=True)
    mask = jnp.asarray(target_mask)
    clamped = jnp.where(mask, jnp.maximum(jnp.asarray(target_probs, jnp.float32), epsilon), 0.0)
    mass = clamped.sum(-1, keepdims=True)
    targets = clamped / jnp.where(mass > 0, mass, 1.0)
    losses = target_divergence(log_probs, targets).sum(-1)

    scored = jnp.asarray(step_mask) & mask.any(-1)
    count = scored.sum(-1)
    rows = jnp.where(scored, losses, 0.0).sum(-1) / jnp.maximum(count, 1)
    num_rows = (count > 0).sum()
    return jnp.where(num_rows > 0, rows.sum() / jnp.maximum(num_rows, 1), jnp.nan)


def target_divergence(log_probs: Float[Array, "*S"], targets: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The term q (ln q - ln p) of every candidate, 0 where the target has no mass whatever the model says there."""
    has_mass = targets > 0
    log_targets = jnp.log(jnp.where(has_mass, targets, 1.0))
    return jnp.where(has_mass, targets * (log_targets - jnp.where(has_mass, log_probs, 0.0)), 0.0)


def hard_target_loss(
    logits: Float[Array | np.ndarray, "B L V"], labels: Int[Array | np.ndarray, "B L"]
) -> Float[Array, ""]:
    """Mean cross-entropy of the next token over all scored positions of the batch, in float32.

    The shift happens here: the logits at position t predict the label at t + 1, so the label at position 0 is never
    scored.

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
