"""What a model weighs, worked out from shapes alone: nothing is allocated."""

import functools
import math
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from cft_jax.common.errors import UserError
from cft_jax.models.config import GatedMlp, LoraSpec, ModelConfig
from cft_jax.models.layers import LoraParam
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.rules import num_shards, sharding

_FLOAT32 = 4
# AdamW's two moments and the gradient, all float32.
_OPTIMIZER_ARRAYS, _GRADIENT_ARRAYS = 2, 1
# Values of one layer's residual stream and its feed-forward layer, 32 MiB of them, and tokens below which reading the
# weights takes longest.
_FAST_VALUES, _LEAST_TOKENS = 16 << 20, 512
# Scores and probabilities of one layer's attention.
_ATTENTION_ARRAYS = 2


@dataclass(frozen=True)
class Batch:
    """What goes through the model at a time: `rows` of `length` tokens, over all devices."""

    rows: int
    length: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Parameters of the whole model, and bytes on each device; activations are estimated, the rest is exact."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes per device."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        sizes = ", ".join(f"{name} {_gib(getattr(self, name))}" for name in parts)
        return (
            f"{self.parameters:,} parameters ({self.trainable:,} trained); per device about {_gib(self.total)}: {sizes}"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def estimate_memory(
    config: ModelConfig,
    *,
    lora: LoraSpec | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    mesh: Mesh | AbstractMesh,
    batch: Batch | None,
    remat: str,
) -> MemoryEstimate:
    """What training takes on each device of a mesh, for one forward and backward pass of the batch.

    Adapters are trained while the rest is frozen; `lora=None` trains every weight. `dtype` is that of activations,
    `remat` as of `Transformer`; without a batch the activations are left out.
    """
    parameters = trainable = weights = trained = 0
    for variable in variables(config, lora, param_dtype):
        shape, axes = variable.shape, variable.get_metadata("axes")
        size, share = math.prod(shape), math.prod(sharding(shape, axes, mesh).shard_shape(shape))
        weights += share * jnp.dtype(variable.dtype).itemsize
        if lora is None or isinstance(variable, LoraParam):
            trainable += size
            trained += share
        if not isinstance(variable, LoraParam):
            parameters += size
    return MemoryEstimate(
        parameters=parameters,
        trainable=trainable,
        weights=weights,
        gradients=_GRADIENT_ARRAYS * trained * _FLOAT32,
        optimizer=_OPTIMIZER_ARRAYS * trained * _FLOAT32,
        activations=0 if batch is None else _activations(config, jnp.dtype(dtype).itemsize, mesh, batch, remat),
    )


@functools.cache
def variables(config: ModelConfig, lora: LoraSpec | None, param_dtype: DTypeLike) -> tuple[nnx.Variable, ...]:
    """Every weight of a model as shapes, with its logical axes; adapters included where there are some."""
    model = nnx.eval_shape(lambda: Transformer(config, lora=lora, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    return tuple(variable for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)))


def _activations(config: ModelConfig, itemsize: int, mesh: Mesh | AbstractMesh, batch: Batch, remat: str) -> int:
    """Bytes kept for the backward pass and used within one layer; scores of the head are bounded apart."""
    rows = -(-batch.rows // num_shards("batch", mesh))
    tokens, tensor = rows * batch.length, mesh.shape["tensor"]
    heads = config.num_heads * config.head_dim
    keys = 2 * config.num_kv_heads * config.head_dim
    mlp = config.mlp
    # Columns between the matrices of the feed-forward layer: gate, up and their product, for every expert of a token.
    wide = 3 * mlp.hidden_dim * (1 if isinstance(mlp, GatedMlp) else mlp.num_experts_per_token)
    scores = _ATTENTION_ARRAYS * config.num_heads * batch.length * _FLOAT32
    columns = {
        "none": 6 * config.embed_dim + (2 * (heads + keys) + heads + wide) / tensor,
        "dots": 2 * config.embed_dim + wide * 2 / 3 / tensor,
        "full": config.embed_dim,
    }
    whole = tokens * (columns["none"] * itemsize + scores / tensor)
    kept = tokens * columns[remat] * itemsize
    if remat == "none":
        return math.ceil(config.num_layers * whole)
    return math.ceil(config.num_layers * kept + len(config.layer_pattern) * whole)


def micro_batches(
    config: ModelConfig, batch: Batch, mesh: Mesh | AbstractMesh | None, *, lora: LoraSpec | None, platform: str
) -> int:
    """In how many parts a step's batch is computed where the configuration leaves that open.

    Only few enough tokens at a time leave what a layer computes in a TPU's fast memory (128 MiB, of v5e and v6e), which
    is worth reading the weights again (Qwen3-1.7B on v6e: a quarter fewer cycles). Not so where weights are gathered
    from other devices, where there are many of them for each token, or where their gradients are added up too.
    `platform` is what the mesh's devices are, which need not be there.
    """
    if (
        platform != "tpu"
        or mesh is None
        or lora is None
        or mesh.shape["fsdp"] > 1
        or not isinstance(config.mlp, GatedMlp)
    ):
        return 1
    rows = -(-batch.rows // num_shards("batch", mesh))
    width = config.embed_dim + config.mlp.hidden_dim // mesh.shape["tensor"]
    parts = (n for n in range(1, rows + 1) if rows % n == 0)
    fits = (n for n in parts if rows // n * batch.length * width <= _FAST_VALUES)
    return next((n for n in fits if rows // n * batch.length >= _LEAST_TOKENS), 1)


def require_memory(estimate: MemoryEstimate, available: int | None) -> None:
    """Refuses what cannot fit into so many bytes per device; None where the device does not tell.

    Raises:
      UserError: weights, gradients and optimizer alone are more than there is.
    """
    needed = estimate.total - estimate.activations
    if available is not None and needed > available:
        raise UserError(
            f"the model needs {_gib(needed)} per device before any activation and each has {_gib(available)}; "
            "raise config.mesh.fsdp or config.mesh.tensor, train with LoRA, or take a smaller model"
        )


def host_memory() -> int | None:
    """Bytes that this machine has; None where the system does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def device_memory() -> int | None:
    """Bytes that the first local device can hand out; CPU devices share the machine's; None where it does not tell."""
    device = jax.local_devices()[0]
    if device.platform == "cpu" and (machine := host_memory()) is not None:
        return machine // jax.local_device_count()
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")
