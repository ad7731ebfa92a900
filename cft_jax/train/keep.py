"""What a step keeps of the base model: the loss of kept texts, or of the tokens that no answer has, as a sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from cft_jax.config import KeepConfig
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.base_loss import Base, base_divergences
from cft_jax.objectives.batch_loss import DeviceBatch, states_at_targets, targets_of
from cft_jax.objectives.fused_loss import position_losses
from cft_jax.objectives.head import HeadOptions, Targets
from cft_jax.train.state import base_of


class DeviceKept(NamedTuple):
    """Rows of kept texts on the devices; the fields are those of `cft_jax.data.kept.KeptBatch`."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    subtree_end: Int[Array, "B T"]
    next_tokens: Int[Array, "B T"]
    weight: Float[Array, "B T"]
    base_hidden: Float[Array, "B T D"] | None = None


# Among the frozen weights of a model that is trained in full: the head that its base began with.
BASE_HEAD = "base_head"


@dataclass(frozen=True)
class KeepOptions:
    """What is kept, and how much it counts.

    Attributes:
      kind: "kl", "off_support" or "replay".
      weight: of the mean loss beside that of the answers.
      head: of the scores, at temperature 1.
      base: the base made of the frozen weights; None where its hidden states come with the texts.
    """

    kind: str
    weight: float
    head: HeadOptions
    base: Callable[[Mapping[str, Array]], Transformer] | None

    @property
    def needs_remembering(self) -> bool:
        """Whether the kept texts must bring what the base said, since training changes its weights."""
        return self.kind == "kl" and self.base is None


def keep_options(model: Transformer, keep: KeepConfig) -> KeepOptions | None:
    """How the steps of a run keep what its model's base does; None where nothing is kept."""
    if keep.weight == 0:
        return None
    head = HeadOptions(tau=1.0, softcap=model.config.final_softcap, entropy=False, mesh=model.mesh)
    return KeepOptions(keep.kind, keep.weight, head, None if model.lora_spec is None else base_of(model))


def kept_texts_loss(
    model: Transformer,
    frozen: Mapping[str, Array],
    kept: DeviceKept,
    options: KeepOptions,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """Sum over the tokens of kept texts of KL(base ‖ model), or of the cross-entropy (`replay`), in nats.

    `key` is of the adapters' dropout; the base has none.
    """
    hidden, _ = model.hidden(kept.tokens, kept.positions, kept.subtree_end, key=key)
    if options.kind == "replay":
        position = jnp.broadcast_to(jnp.arange(kept.tokens.shape[1]), kept.tokens.shape)
        targets = Targets(position, kept.next_tokens, kept.weight)
        losses = position_losses(hidden, model.head_kernel(), targets, options.head)
    else:
        losses = base_divergences(hidden, model.head_kernel(), _base_of_texts(frozen, kept, options), options.head)
    return jnp.sum(jnp.where(kept.weight > 0, kept.weight * losses, 0.0))


def off_support_loss(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    base_hidden: Float[Array, "B T D"],
    base_kernel: Float[Array, "V D"],
    batch: DeviceBatch,
    options: KeepOptions,
) -> Float[Array, ""]:
    """Sum over target positions, weighted as they are, of KL(base ‖ model) among the tokens that no answer has there.

    Both distributions are divided by their sums over those tokens (arXiv 2605.29498).
    """
    at_targets, at_base = (states_at_targets(states, batch) for states in (hidden, base_hidden))
    losses = base_divergences(
        at_targets, model.head_kernel(), Base(at_base, base_kernel), options.head, without=targets_of(batch)
    )
    return jnp.sum(jnp.where(batch.target_weight > 0, batch.target_weight * losses, 0.0))


def _base_of_texts(frozen: Mapping[str, Array], kept: DeviceKept, options: KeepOptions) -> Base:
    if options.base is None:
        assert kept.base_hidden is not None
        return Base(kept.base_hidden, frozen[BASE_HEAD])
    base = options.base(frozen)
    hidden, _ = base.hidden(kept.tokens, kept.positions, kept.subtree_end)
    return Base(jax.lax.stop_gradient(hidden), base.head_kernel())
