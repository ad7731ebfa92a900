"""One training step: a pure function of state and batch, jitted once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from cft_jax.common.rng import fold_in, make_key
from cft_jax.models.transformer import KVCache, Transformer
from cft_jax.objectives.batch_loss import DeviceBatch, batch_loss
from cft_jax.objectives.head import HeadOptions
from cft_jax.sharding.rules import constrain
from cft_jax.train.state import ModelParts, TrainState, Weights


class StepMetrics(NamedTuple):
    """What a step measured; scalars on the devices.

    Attributes:
      loss: of the whole global batch, before the update.
      grad_norm: global norm of the gradient, before clipping.
      learning_rate: of this update.
      finite: whether loss and gradient were; if not, the update was left out.
      skipped: updates left out so far.
      padding_fraction: share of token places that are padding.
      tokens: that went through the model, padding aside; what all rows begin with counts once.
      steps: whose loss was taken.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    skipped: Int[Array, ""]
    padding_fraction: Float[Array, ""]
    tokens: Int[Array, ""]
    steps: Int[Array, ""]


@dataclass(frozen=True)
class StepOptions:
    """What shapes a step, beside the model.

    Attributes:
      loss: of the head.
      shared_prefix: tokens that every row's prompt begins with and that the batches leave out.
      micro_batches: parts of the batch whose gradients are added up.
      seed: of the dropout.
      optimizer: up to the learning rate.
      learning_rate: of an update, by the number of updates before it.
    """

    loss: HeadOptions
    shared_prefix: tuple[int, ...]
    micro_batches: int
    seed: int
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Int[Array, ""]], Float[Array, ""]]


TrainStep = Callable[[TrainState, dict[str, Array], DeviceBatch], tuple[TrainState, StepMetrics]]


def make_train_step(parts: ModelParts, options: StepOptions, shardings: TrainState) -> TrainStep:
    """The jitted step; it consumes the state given to it (its buffers are reused).

    The loss is Σ over the global batch / Σ over the global batch, whatever the number of microbatches. An update
    whose loss or gradient is not finite is left out; the step still counts. `shardings` are those of the state.
    """

    def train_step(state: TrainState, frozen: dict[str, Array], batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        key = make_key(options.seed, "dropout", state.step)
        loss, gradient = _loss_and_gradient(parts, options, state.weights, frozen, batch, key)
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
        metrics = StepMetrics(loss, grad_norm, rate, finite, skipped, padding, tokens, steps)
        return TrainState(state.step + 1, skipped, weights, moments), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _loss_and_gradient(
    parts: ModelParts,
    options: StepOptions,
    weights: Weights,
    frozen: dict[str, Array],
    batch: DeviceBatch,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Weights]:
    total = jnp.sum(batch.row_weight)

    def share_of_loss(weights: Weights, rows: DeviceBatch, key: Key[Array, ""]) -> Float[Array, ""]:
        model = parts.merge(weights, frozen)
        context = _shared_context(model, options.shared_prefix, fold_in(key, 0))
        hidden, _ = model.hidden(rows.tokens, rows.positions, rows.subtree_end, context=context, key=fold_in(key, 1))
        return batch_loss(hidden, model.head_kernel(), rows, options.loss)[0] / total

    differentiate = jax.value_and_grad(share_of_loss)
    if options.micro_batches == 1:
        return differentiate(weights, batch, key)

    def add(sums, part):
        index, rows = part
        return jax.tree.map(jnp.add, sums, differentiate(weights, rows, fold_in(key, index))), None

    parts_of_batch = (jnp.arange(options.micro_batches), _microbatches(batch, options))
    nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, weights))
    return jax.lax.scan(add, nothing, parts_of_batch)[0]


def _shared_context(model: Transformer, tokens: tuple[int, ...], key: Key[Array, ""]) -> tuple[KVCache, ...]:
    """Keys and values of the tokens that all rows share, computed once, gradients included."""
    if not tokens:
        return ()
    places = jnp.arange(len(tokens))[None]
    return (model.hidden(jnp.asarray(tokens)[None], places, jnp.full_like(places, len(tokens)), key=key)[1],)


def _microbatches(batch: DeviceBatch, options: StepOptions) -> DeviceBatch:
    """The batch with a leading axis of microbatches; each takes every n-th row, so that no row changes its device."""
    count = options.micro_batches

    def cut(x: Array) -> Array:
        parts = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        return constrain(parts, (None, "batch", *[None] * (x.ndim - 1)), options.loss.mesh)

    return jax.tree.map(cut, batch)
