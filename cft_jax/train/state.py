"""What training changes and what it leaves alone: the model split once into graph, trained and frozen weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int

from cft_jax.models.layers import LoraParam
from cft_jax.models.transformer import Transformer

Weights = dict[str, Float32[Array, "..."]]


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: number of steps done.
      skipped: how many of them were left out because their loss or gradient was not finite.
      weights: the trained weights by path, always float32 (whatever the model stores), so that small updates add up.
      optimizer: state of the optimizer, sharded like the weights.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    weights: Weights
    optimizer: optax.OptState


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The model without its weights: how to put it together again inside a step."""

    graphdef: Any
    trained: "_Layout"
    frozen: "_Layout"

    def merge(self, weights: Weights, frozen: dict[str, Array]) -> Transformer:
        """The model with the given weights."""
        return nnx.merge(self.graphdef, self.trained.state(weights), self.frozen.state(frozen))

    def update(self, model: Transformer, weights: Weights) -> None:
        """Writes trained weights into a model of the same structure."""
        nnx.update(model, self.trained.state(weights))


@dataclass(frozen=True, eq=False)
class _Layout:
    """How named arrays make up an NNX state: by path the dtypes that the model stores, and the tree."""

    dtypes: dict[str, Any]
    tree: Any

    def state(self, arrays: Mapping[str, Array]) -> Any:
        return jax.tree.unflatten(self.tree, [arrays[name].astype(dtype) for name, dtype in self.dtypes.items()])


def split_model(model: Transformer) -> tuple[ModelParts, Weights, dict[str, Array]]:
    """Graph, trained weights (the adapters of a model that has some, else all) and frozen ones, both by path.

    The weights returned are the model's own arrays where they are float32 already: once a step has been given them,
    the model must not be used before `ModelParts.update`.
    """
    trained_filter = nnx.Param if model.lora_spec is None else LoraParam
    graphdef, *states = nnx.split(model, trained_filter, ...)
    (trained, weights), (rest, frozen) = [_named(state) for state in states]
    # Shapes alone (`abstract_model`) have no `astype`; what is trained is float32 there.
    weights = {name: x if x.dtype == jnp.float32 else x.astype(jnp.float32) for name, x in weights.items()}
    return ModelParts(graphdef, trained, rest), weights, frozen


def base_of(model: Transformer) -> Callable[[Mapping[str, Array]], Transformer]:
    """How to make the model without its adapters from its frozen weights: another graph, no copy of the weights."""

    def bare() -> Transformer:
        return Transformer(
            model.config, dtype=model.dtype, param_dtype=model.param_dtype, mesh=model.mesh, rngs=nnx.Rngs(0)
        )

    graphdef, state = nnx.split(nnx.eval_shape(bare))
    layout, _ = _named(state)
    return lambda frozen: nnx.merge(graphdef, layout.state(frozen))


def without_adapters(model: Transformer) -> Transformer:
    """The model without its adapters, sharing its weights; itself where it has none."""
    if model.lora_spec is None:
        return model
    base = base_of(model)(split_model(model)[2])
    base.source = model.source
    return base


def _named(state: Any) -> tuple[_Layout, dict[str, Any]]:
    """Arrays, or what stands for them, by path."""
    leaves, tree = jax.tree.flatten(state)
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    arrays = dict(zip(names, leaves, strict=True))
    return _Layout({name: array.dtype for name, array in arrays.items()}, tree), arrays


def state_shardings(weights: Weights, optimizer: optax.GradientTransformation) -> TrainState:
    """Where each part of the train state lies: moments with their weights, counts on every device."""
    of_weights = {name: weight.sharding for name, weight in weights.items()}
    first = next(iter(of_weights.values()))
    everywhere = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first
    of_optimizer = optax.tree_map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, weights),
        of_weights,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, everywhere, of_weights, of_optimizer)  # type: ignore[arg-type]


def abstract_state(weights: Weights, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the train state, without any memory."""
    shardings = state_shardings(weights, optimizer)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(count, count, weights, jax.eval_shape(optimizer.init, weights))  # type: ignore[arg-type]
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def initial_state(weights: Weights, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; it takes over the weights' arrays."""
    shardings = state_shardings(weights, optimizer)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(weights)
    zero = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=shardings.step)
    return TrainState(zero(), zero(), weights, moments)
