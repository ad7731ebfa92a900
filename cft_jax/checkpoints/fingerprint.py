"""A fingerprint of weights that depends on every bit and its index, and on nothing else: no mesh, no device."""

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

_SALTS = (0x9E3779B9, 0x7F4A7C15)


def fingerprint(tree: Any, *settings: Any) -> str:
    """Hex digest of a pytree of arrays, names, shapes, dtypes and bits, and of settings.

    Each leaf is hashed where it lies: a sum over elements, modulo 2^32, of a mix of bits and index. Integer sums do
    not depend on their order, so every sharding gives the same digest, without gathering anything. It detects
    accidents (a flipped bit, another checkpoint), not attacks.

    Args:
      tree: of arrays of 1, 2 or 4 bytes per element.
      settings: what else decides the numbers: records, sequences, texts and numbers; see `settings_digest`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_leaf_hashes([leaf for _, leaf in leaves]))
    digest = hashlib.sha256(settings_digest(*settings).encode() if settings else b"")
    for (path, leaf), sum_of_bits in zip(leaves, sums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {leaf.shape} {jnp.dtype(leaf.dtype).name} {sum_of_bits.tolist()}\n".encode())
    return digest.hexdigest()[:32]


def settings_digest(*settings: Any) -> str:
    """Hex digest of settings, the same in any process and on any machine."""
    return hashlib.sha256(repr(_portable(settings)).encode()).hexdigest()[:32]


def _portable(value: Any) -> Any:
    """Settings with floats of ten digits: some are worked out, and the last bit of a power or logarithm may differ."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if dataclasses.is_dataclass(value):
        named = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return type(value).__name__, *((name, _portable(inner)) for name, inner in named)
    return tuple(map(_portable, value)) if isinstance(value, tuple | list) else value


@jax.jit
def _leaf_hashes(leaves: list[Array]) -> list[UInt32[Array, "2"]]:
    return [jnp.stack([_hash(leaf, salt) for salt in _SALTS]) for leaf in leaves]


def _hash(x: Array, salt: int) -> UInt32[Array, ""]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.full(x.shape, salt, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _mix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3 (public domain, Austin Appleby): every input bit moves every output bit."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
