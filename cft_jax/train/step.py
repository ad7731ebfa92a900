"""One training step: a pure function of state and batch, jitted once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from cft_jax.common.rng import fold_in, make_key
from cft_jax.models.attention import Leaders
from cft_jax.models.memory import Batch, micro_batches
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.batch_loss import DeviceBatch, batch_loss
from cft_jax.objectives.head import HeadOptions
from cft_jax.sharding.mesh import platform
from cft_jax.sharding.rules import constrain, num_shards
from cft_jax.train.keep import DeviceKept, KeepOptions, kept_texts_loss, off_support_loss
from cft_jax.train.state import ModelParts, TrainState, Weights

_Rows = TypeVar("_Rows")


class StepMetrics(NamedTuple):
    """What a step measured; scalars on the devices.

    Attributes:
      loss: of the whole global batch, before the update; what is kept of the base counts apart.
      grad_norm: global norm of the gradient, before clipping.
      learning_rate: of this update.
      finite: whether loss and gradient were; if not, the update was left out.
      skipped: updates left out so far.
      padding_fraction: share of token places that are padding.
      tokens: that went through the model, padding aside; what all rows begin with counts once.
      steps: whose loss was taken.
      keep_loss: of what is kept, before its weight; None where nothing is.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    skipped: Int[Array, ""]
    padding_fraction: Float[Array, ""]
    tokens: Int[Array, ""]
    steps: Int[Array, ""]
    keep_loss: Float[Array, ""] | None = None


@dataclass(frozen=True)
class StepOptions:
    """What shapes a step, beside the model.

    Attributes:
      loss: of the head.
      shared_prefix: tokens that every row's prompt begins with and that the batches leave out.
      micro_batches: parts of the batch whose gradients are added up; 0 leaves the number to the device.
      seed: of the dropout.
      optimizer: up to the learning rate.
      learning_rate: of an update, by the number of updates before it.
      keep: what is kept of the base; None for nothing.
    """

    loss: HeadOptions
    shared_prefix: tuple[int, ...]
    micro_batches: int
    seed: int
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Int[Array, ""]], Float[Array, ""]]
    keep: KeepOptions | None = None


@runtime_checkable
class TrainStep(Protocol):
    """A step: state, frozen weights, the batch, and the kept texts of a run that keeps some."""

    def __call__(
        self, state: TrainState, frozen: dict[str, Array], batch: DeviceBatch, kept: DeviceKept | None = None
    ) -> tuple[TrainState, StepMetrics]: ...


def make_train_step(parts: ModelParts, options: StepOptions, shardings: TrainState) -> TrainStep:
    """The jitted step; it consumes the state given to it (its buffers are reused).

    The loss is Σ over the global batch / Σ over the global batch, whatever the number of microbatches. An update
    whose loss or gradient is not finite is left out; the step still counts. `shardings` are those of the state.
    """

    def train_step(
        state: TrainState, frozen: dict[str, Array], batch: DeviceBatch, kept: DeviceKept | None = None
    ) -> tuple[TrainState, StepMetrics]:
        key = make_key(options.seed, "dropout", state.step)
        (loss, keep_loss), gradient = _losses_and_gradient(parts, options, state.weights, frozen, (batch, kept), key)
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        rate = options.learning_rate(state.step)
        updates, moments = options.optimizer.update(gradient, state.optimizer, state.weights)
        weights = jax.tree.map(lambda weight, update: weight - rate * update, state.weights, updates)
        weights, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (weights, moments), (state.weights, state.optimizer)
        )
        skipped = state.skipped + jnp.where(finite, 0, 1)
        padding = jnp.mean(batch.subtree_end == 0, dtype=jnp.float32)
        tokens = jnp.sum(batch.subtree_end > 0) + len(options.shared_prefix)
        steps = jnp.sum(batch.target_weight > 0)
        if kept is not None:
            tokens, steps = tokens + jnp.sum(kept.subtree_end > 0), steps + jnp.sum(kept.weight > 0)
        metrics = StepMetrics(loss, grad_norm, rate, finite, skipped, padding, tokens, steps, keep_loss)
        return TrainState(state.step + 1, skipped, weights, moments), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _losses_and_gradient(
    parts: ModelParts,
    options: StepOptions,
    weights: Weights,
    frozen: dict[str, Array],
    batch: tuple[DeviceBatch, DeviceKept | None],
    key: Key[Array, ""],
) -> tuple[tuple[Float[Array, ""], Float[Array, ""] | None], Weights]:
    """The mean losses of the answers and of what is kept, and the gradient of their weighted sum."""
    total = jnp.sum(batch[0].row_weight)
    total_kept = None if batch[1] is None else jnp.sum(batch[1].weight)
    keep = options.keep

    def share_of_losses(weights: Weights, part: tuple[DeviceBatch, DeviceKept | None], key: Key[Array, ""]):
        rows, kept = part
        model = parts.merge(weights, frozen)
        hidden = _hidden(model, rows, options.shared_prefix, key)
        loss = batch_loss(hidden, model.head_kernel(), rows, options.loss)[0] / total
        if keep is None:
            return loss, (loss, None)
        if keep.kind != "off_support":
            assert kept is not None and total_kept is not None
            kept_loss = kept_texts_loss(model, frozen, kept, keep, fold_in(key, 2)) / total_kept
        else:
            assert keep.base is not None
            base = keep.base(frozen)
            base_hidden = _hidden(base, rows, options.shared_prefix, None)
            kept_loss = off_support_loss(model, hidden, base_hidden, base.head_kernel(), rows, keep) / total
        return loss + keep.weight * kept_loss, (loss, kept_loss)

    differentiate = jax.value_and_grad(share_of_losses, has_aux=True)
    count = options.micro_batches or _count(parts.merge(weights, frozen), batch)
    if count == 1:
        (_, losses), gradient = differentiate(weights, batch, key)
        return losses, gradient

    def add(sums, part):
        index, rows = part
        (_, losses), gradient = differentiate(weights, rows, fold_in(key, index))
        return jax.tree.map(jnp.add, sums, (losses, gradient)), None

    parts_of_batch = (jnp.arange(count), _microbatches(batch, count, options.loss.mesh))
    zero = jnp.zeros((), jnp.float32)
    nothing = (zero, None if keep is None else zero), jax.tree.map(jnp.zeros_like, weights)
    return jax.lax.scan(add, nothing, parts_of_batch)[0]


def _count(model: Transformer, batch: tuple[DeviceBatch, DeviceKept | None]) -> int:
    """Microbatches that suit the device; see `micro_batches`."""
    of = {"lora": model.lora_spec, "platform": platform(model.mesh)}
    count = micro_batches(model.config, Batch(*batch[0].tokens.shape), model.mesh, **of)
    return count if batch[1] is None else math.gcd(count, len(batch[1].weight) // num_shards("batch", model.mesh))


def _hidden(
    model: Transformer, rows: DeviceBatch, shared_prefix: tuple[int, ...], key: Key[Array, ""] | None
) -> Float[Array, "B T D"]:
    """Hidden states of the rows after the tokens that all share, which go through the model once, on each device."""
    length, (B, T) = len(shared_prefix), rows.tokens.shape
    first, rest = (None, None) if key is None else (fold_in(key, 0), fold_in(key, 1))
    own = (rows.tokens, rows.positions, rows.subtree_end)
    if not length:
        return model.hidden(*own, key=rest)[0]
    prefix = (jnp.asarray(shared_prefix), jnp.arange(length), jnp.full(length, length))
    if length > T:
        context = model.hidden(*(x[None] for x in prefix), key=first)[1]
        return model.hidden(*own, context=(context,), key=rest)[0]
    groups = num_shards("batch", model.mesh)
    groups = groups if B % groups == 0 else 1

    def led(leader: Int[Array, "S"], others: Int[Array, "B T"]) -> Int[Array, "_ T"]:
        leaders = jnp.broadcast_to(jnp.pad(leader, (0, T - length)), (groups, 1, T))
        whole = jnp.concatenate([leaders, others.reshape(groups, -1, T)], axis=1).reshape(-1, T)
        return constrain(whole, ("batch", "length"), model.mesh)

    leaders = Leaders(groups, length)
    hidden, _ = model.hidden(*map(led, prefix, own), key=rest, leaders=leaders)
    hidden = hidden.reshape(groups, -1, *hidden.shape[1:])[:, 1:].reshape(B, T, -1)
    return constrain(hidden, ("batch", "length", "act_embed"), model.mesh)


def _microbatches(batch: _Rows, count: int, mesh: Mesh | None) -> _Rows:
    """The batch with a leading axis of microbatches; each takes every n-th row, so that no row changes its device."""

    def cut(x: Array) -> Array:
        parts = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        return constrain(parts, (None, "batch", *[None] * (x.ndim - 1)), mesh)

    return jax.tree.map(cut, batch)
