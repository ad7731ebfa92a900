"""The TPU kernel of what heads go through before attention: their norm, where there is one, and rotary embedding.

It does both at once, forward and backward, where XLA takes a pass for each step and half a register for each half of a
head.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cft_jax.sharding.rules import partition_spec

# Tokens of one program, and values of all its heads.
_TOKENS, _VALUES = 512, 1 << 18


class Factors(NamedTuple):
    """What multiplies heads: those of `rotate`, and the norm's weight, or None without a norm."""

    cos: Float[Array, "B T H"]
    sin: Float[Array, "B T H"]
    scale: Float[Array, "1 H"] | None


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def by_kernel(
    x: Float[Array, "B N T H"], factors: Factors, eps: float, mesh: Mesh | None, interpret: bool = False
) -> Float[Array, "B N T H"]:
    """The kernel, on each device for its rows and heads; `interpret` runs it as ordinary operations, anywhere."""
    return _call(_forward_kernel, "head_rotation", eps, mesh, interpret, factors, x)


def _forward(x, factors, eps, mesh, interpret):
    return by_kernel(x, factors, eps, mesh, interpret), (x, factors)


def _backward(eps, mesh, interpret, kept, gradient):
    x, factors = kept
    scale = factors.scale
    if scale is not None:
        # Of use only where the norm is trained; XLA drops it elsewhere.
        turned = _turned_back(gradient.astype(jnp.float32), factors.cos[:, None], factors.sin[:, None])
        normed = x.astype(jnp.float32)
        normed = normed * jax.lax.rsqrt(jnp.mean(jnp.square(normed), axis=-1, keepdims=True) + eps)
        scale = jnp.sum(turned * normed, axis=(0, 1, 2))[None]
    to_x = _call(_backward_kernel, "head_rotation_backward", eps, mesh, interpret, factors, x, gradient)
    return to_x, Factors(jnp.zeros_like(factors.cos), jnp.zeros_like(factors.sin), scale)


by_kernel.defvjp(_forward, _backward)


def _call(
    kernel: Any, name: str, eps: float, mesh: Mesh | None, interpret: bool, factors: Factors, *heads: Array
) -> Array:
    def run(factors: Factors, *heads: Float[Array, "b n T H"]) -> Float[Array, "b n T H"]:
        B, N, T, H = heads[0].shape
        tokens = min(T, _TOKENS)
        count = max(n for n in range(1, N + 1) if N % n == 0 and (n == 1 or n * tokens * H <= _VALUES))
        of_heads = pl.BlockSpec((None, count, tokens, H), lambda b, n, t: (b, n, t, 0))
        of_tokens = pl.BlockSpec((None, tokens, H), lambda b, n, t: (b, t, 0))
        scale = None if factors.scale is None else pl.BlockSpec((1, H), lambda b, n, t: (0, 0))
        size = heads[0].dtype.itemsize
        return pl.pallas_call(
            partial(kernel, eps=eps),
            grid=(B, N // count, pl.cdiv(T, tokens)),
            in_specs=(Factors._make((of_tokens, of_tokens, scale)), *[of_heads] * len(heads)),
            out_specs=of_heads,
            out_shape=jax.ShapeDtypeStruct(heads[0].shape, heads[0].dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
            cost_estimate=pl.CostEstimate(
                flops=12 * len(heads) * heads[0].size,
                transcendentals=0,
                bytes_accessed=(1 + len(heads)) * heads[0].size * size,
            ),
            interpret=interpret,
            name=name,
        )(factors, *heads)

    if mesh is None:
        return run(factors, *heads)
    of_heads = partition_spec(heads[0].shape, ("batch", "heads", None, None), mesh)
    of_tokens = partition_spec(factors.cos.shape, ("batch", None, None), mesh)
    scale = None if factors.scale is None else partition_spec(factors.scale.shape, (None, None), mesh)
    specs = (Factors._make((of_tokens, of_tokens, scale)), *[of_heads] * len(heads))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=of_heads, check_vma=False)(factors, *heads)


def _forward_kernel(factors: Any, heads: Any, out: Any, *, eps: float) -> None:
    cos, sin = factors.cos[...], factors.sin[...]
    for n in range(heads.shape[0]):
        x = heads[n].astype(jnp.float32)
        if factors.scale is not None:
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * factors.scale[...]
            # As after a norm of its own.
            x = x.astype(heads.dtype).astype(jnp.float32)
        out[n] = (x * cos + _turned(x) * sin).astype(out.dtype)


def _backward_kernel(factors: Any, heads: Any, gradients: Any, out: Any, *, eps: float) -> None:
    cos, sin = factors.cos[...], factors.sin[...]
    for n in range(heads.shape[0]):
        gradient = _turned_back(gradients[n].astype(jnp.float32), cos, sin)
        if factors.scale is not None:
            x = heads[n].astype(jnp.float32)
            inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
            x, gradient = x * inverse, gradient * factors.scale[...]
            gradient = (gradient - x * jnp.mean(gradient * x, axis=-1, keepdims=True)) * inverse
        out[n] = gradient.astype(out.dtype)


def _turned(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """The halves of the last axis, the second first."""
    return jnp.roll(x, x.shape[-1] // 2, axis=-1)


def _turned_back(gradient: Float[Array, "... H"], cos: Float[Array, "... H"], sin: Float[Array, "... H"]) -> Array:
    """The gradient of what `rotate` was given."""
    return gradient * cos + _turned(gradient * sin)
