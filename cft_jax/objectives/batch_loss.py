"""The loss of a batch of rows as a sum and its weight, so that batches of any make-up add up to one mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cft_jax.objectives.fused_loss import position_losses
from cft_jax.objectives.head import HeadOptions, Targets


class DeviceBatch(NamedTuple):
    """A batch on the devices: B rows of T tokens with P target positions and K target entries each.

    The fields are those of `cft_jax.data.batch.TargetBatch`, which says what they mean.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    subtree_end: Int[Array, "B T"]
    target_index: Int[Array, "B P"]
    target_weight: Float[Array, "B P"]
    target_position: Int[Array, "B K"]
    target_ids: Int[Array, "B K"]
    target_probs: Float[Array, "B K"]
    row_weight: Float[Array, "B"]


def batch_loss(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "V D"], batch: DeviceBatch, options: HeadOptions
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ target_weight · loss(position) and Σ row_weight, float32; their quotient over a whole batch is its mean loss.

    `hidden` is of every position, after the final norm; `kernel` is the head's, one row per token. Hidden states are
    gathered before the head, so logits exist at the target positions alone. Those of weight 0 reach neither value nor
    gradient, whatever stands there.
    """
    losses = position_losses(states_at_targets(hidden, batch), kernel, targets_of(batch), options)
    real = batch.target_weight > 0
    return jnp.sum(jnp.where(real, batch.target_weight * losses, 0.0)), jnp.sum(batch.row_weight)


def states_at_targets(hidden: Float[Array, "B T D"], batch: DeviceBatch) -> Float[Array, "B P D"]:
    """The hidden states of the target positions; zeros at padding."""
    at_targets = jnp.take_along_axis(hidden, batch.target_index[..., None], axis=1)
    return jnp.where(batch.target_weight[..., None] > 0, at_targets, jnp.zeros((), hidden.dtype))


def targets_of(batch: DeviceBatch) -> Targets:
    """The target distributions of a batch."""
    return Targets(batch.target_position, batch.target_ids, batch.target_probs)


def head_options(kind: str, *, tau: float, softcap: float | None, mesh: jax.sharding.Mesh | None) -> HeadOptions:
    """Options of a kind of target: KL at temperature tau for "soft", plain cross-entropy for "hard".

    Raises:
      ValueError: the kind is neither.
    """
    if kind == "soft":
        return HeadOptions(tau=tau, softcap=softcap, entropy=True, mesh=mesh)
    if kind == "hard":
        return HeadOptions(tau=1.0, softcap=softcap, entropy=False, mesh=mesh)
    raise ValueError(f"kind={kind!r} must be soft or hard")
