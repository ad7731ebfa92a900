"""Weights: parameters with logical axes, linear layers with optional low-rank adapters, the norm."""

import math
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cft_jax.models.config import LoraSpec, ModelConfig
from cft_jax.models.dropout import Noise, dropout

T = TypeVar("T")


class LoraParam(nnx.Param):
    """A weight of an adapter: float32, trained while the base is frozen."""


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """HIGHEST for float32 operands, which TPUs (bf16) and GPUs (TF32) would otherwise round; DEFAULT below."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum(equation: str, x: Array, w: Array, *, out_dtype: DTypeLike | None = None) -> Array:
    """Einsum at the precision that the operands' dtype asks for."""
    dtype = jnp.result_type(x, w)
    return jnp.einsum(equation, x, w, precision=matmul_precision(dtype), preferred_element_type=out_dtype)


def spread(x: Array, ndim: int) -> Array:
    """`x` with leading axes of size 1: what broadcasts is said, since silent rank promotion hides mistakes."""
    return jnp.expand_dims(x, range(ndim - x.ndim))


def normal_param(
    key: Key[Array, ""], shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, dtype: DTypeLike
) -> nnx.Param:
    """A parameter drawn from N(0, 1/fan_in); `axes` names its dimensions for sharding."""
    return nnx.Param(jax.random.normal(key, shape, dtype) / math.sqrt(fan_in), axes=axes)


class Lora(nnx.Module):
    """x -> scale * (dropout(x) A) B; A starts as PEFT's does, B at zero.

    `shape` and `axes` are those of the kernel, whose dimensions `inputs` A has and B has not; both have those before
    (layers, and the experts of `cft_jax.models.moe`).
    """

    def __init__(
        self, spec: LoraSpec, shape: tuple[int, ...], axes: tuple[str, ...], inputs: slice, *, rngs: nnx.Rngs
    ) -> None:
        first, after = inputs.start, inputs.stop
        bound = 1 / math.sqrt(math.prod(shape[inputs]))
        a = jax.random.uniform(rngs.lora(), (*shape[:after], spec.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*shape[:first], spec.rank, *shape[after:]), jnp.float32)
        self.a = LoraParam(a, axes=(*axes[:after], "rank"))
        self.b = LoraParam(b, axes=(*axes[:first], "rank", *axes[after:]))
        self.spec = spec

    def input(self, x: Float[Array, "..."], noise: Noise | None) -> tuple[Float[Array, "..."], float]:
        """What A multiplies, with dropout where noise is given, and what the product of A and B is multiplied by."""
        x = x.astype(jnp.float32) if self.spec.float32 else x
        if noise is None or self.spec.dropout == 0:
            return x, self.spec.scale
        return dropout(x, noise, self.spec.dropout), self.spec.scale / (1 - self.spec.dropout)


@dataclass(frozen=True)
class WeightInit:
    """How the weights of a stack of equal layers start; each carries a leading layer axis.

    Attributes:
      layers: length of that axis.
      lora: adapters; None, or a spec that does not name a linear layer, adds none to it.
      dtype: of the base weights; adapters are float32.
      rngs: streams `params` and `lora`.
    """

    layers: int
    lora: LoraSpec | None
    dtype: DTypeLike
    rngs: nnx.Rngs

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> nnx.Param:
        return normal_param(self.rngs.params(), (self.layers, *shape), ("layers", *axes), fan_in, self.dtype)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return nnx.Param(jnp.zeros((self.layers, *shape), self.dtype), axes=("layers", *axes))

    def adapter(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], inputs: slice) -> Lora | None:
        """The adapter of a linear layer by HF's name, if it has one; `inputs` are those of `shape`."""
        if self.lora is None or name not in self.lora.targets:
            return None
        inputs = slice(inputs.start + 1, inputs.stop + 1)
        return Lora(self.lora, (self.layers, *shape), ("layers", *axes), inputs, rngs=self.rngs)


class Linear(nnx.Module):
    """An einsum with a kernel [L, *in, *out], an optional bias and an optional adapter; applied to one layer's slice.

    Args:
      name: HF's name of the layer, which `LoraSpec.targets` refers to.
      equation: such as "BTD,DNH->BTNH": activations, one layer's kernel, result.
      shape: of the kernel without the layer axis.
      axes: logical axes of those dimensions.
      init: how the weights start.
      bias: whether a bias of the output's shape is added.
    """

    def __init__(
        self,
        name: str,
        equation: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        init: WeightInit,
        *,
        bias: bool = False,
    ) -> None:
        operands, self.out_letters = equation.split("->")
        self.x_letters, kernel_letters = operands.split(",")
        num_in = sum(letter in self.x_letters for letter in kernel_letters)
        self.equation = equation
        self.in_letters, self.new_letters = kernel_letters[:num_in], kernel_letters[num_in:]
        self.name = name
        self.kernel = init.normal(shape, axes, math.prod(shape[:num_in]))
        self.bias = init.zeros(shape[num_in:], axes[num_in:]) if bias else None
        self.lora = init.adapter(name, shape, axes, slice(0, num_in))

    def __call__(self, x: Float[Array, "..."], low: Float[Array, "B T R"] | None) -> Float[Array, "..."]:
        """Applies one layer's slice (the layer axis already removed by the scan); returns the dtype of `x`.

        `low` comes from `low_rank`.
        """
        y = einsum(self.equation, x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + spread(self.bias[...].astype(x.dtype), y.ndim)
        if self.lora is not None and low is not None:
            b = self.lora.b[...].astype(low.dtype)
            update = einsum(f"BTR,R{self.new_letters}->{self.out_letters}", low, b, out_dtype=jnp.float32)
            y = (y.astype(jnp.float32) + update).astype(y.dtype)
        return checkpoint_name(gradient_stored(y), self.name)


def low_rank(
    x: Float[Array, "..."], noise: Noise | None, name: str, *layers: Linear
) -> tuple[Float[Array, "B T R"] | None, ...]:
    """For layers that read the same input, by its name: its products with their A, scaled; None without an adapter.

    All of them see the same dropout, and one product serves all: a TPU's is 128 or 256 columns wide, whatever the rank.
    """
    adapters = [layer.lora for layer in layers if layer.lora is not None]
    if not adapters:
        return (None,) * len(layers)
    x, scale = adapters[0].input(x, None if noise is None else noise.of(name))
    a = jnp.concatenate([adapter.a[...] for adapter in adapters], axis=-1).astype(x.dtype)
    low = einsum(f"{layers[0].x_letters},{layers[0].in_letters}R->BTR", x, a, out_dtype=jnp.float32)
    parts = iter(jnp.split((scale * low).astype(x.dtype), len(adapters), axis=-1))
    return tuple(None if layer.lora is None else next(parts) for layer in layers)


def stored(x: T) -> T:
    """`x`, an array or a tree of them, computed once and kept for all that read it.

    XLA would make cheap values again wherever they are read, which on TPUs costs more than reading them.
    """
    return jax.lax.optimization_barrier(x)


@jax.custom_vjp
def gradient_stored(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, whose gradient is computed once and kept for all that read it."""
    return x


gradient_stored.defvjp(lambda x: (x, None), lambda _, gradient: (stored(gradient),))


class RmsNorm(nnx.Module):
    """Root-mean-square norm over the last axis, float32 statistics and weight (HF *RMSNorm)."""

    def __init__(self, config: ModelConfig, dim: int, layers: int | None, dtype: DTypeLike) -> None:
        lead, axes = ((), ()) if layers is None else ((layers,), ("layers",))
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full((*lead, dim), 1 - self.offset, dtype), axes=(*axes, "act_embed"))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * spread(self.offset + self.scale[...].astype(jnp.float32), x.ndim)).astype(x.dtype)
