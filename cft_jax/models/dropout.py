"""Dropout whose mask is made again in the backward pass instead of being kept.

Random bits from JAX's generators cost a TPU as many cycles as all matrix products of a step with adapters, and their
masks a byte for every value. A hash of (key, token, column) costs one operation a value, fuses into whoever reads the
result, and depends neither on how an array is cut over devices nor on what else is in the batch.
"""

import math
import zlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


class Noise(NamedTuple):
    """What the masks of an array [*B, ...] are made from.

    Attributes:
      key: of the layer and what is dropped there.
      token: a number of each token; tokens of the same number drop the same columns.
    """

    key: Key[Array, ""]
    token: Int[Array, "*B"]

    def of(self, name: str) -> "Noise":
        """Noise of its own for every name."""
        return self._replace(key=jax.random.fold_in(self.key, zlib.crc32(name.encode())))


def dropout(x: Float[Array, "*B D"], noise: Noise, rate: float) -> Float[Array, "*B D"]:
    """`x` with each value zeroed with probability `rate`; the others are not scaled up, which is the caller's."""
    return _dropout(x, jax.random.key_data(noise.key), noise.token, rate)


def keep_mask(
    words: UInt32[Array, "2"], token: Int[Array, "*B"], columns: tuple[int, ...], rate: float
) -> Bool[Array, "..."]:
    """Which values stay, for axes `columns` of every token: fair draws as far as tests of randomness see.

    A token's word times a column's, both odd and well mixed, is as good as a word of its own for each pair of them.
    """
    column = jnp.arange(math.prod(columns), dtype=jnp.uint32).reshape(columns)
    of_token = _mixed(_mixed(token.astype(jnp.uint32) + words[0]) ^ words[1]) | 1
    of_column = _mixed(_mixed(column + words[1]) ^ words[0]) | 1
    bits = jnp.expand_dims(of_token, range(token.ndim, token.ndim + len(columns))) * of_column[(None,) * token.ndim]
    return jax.lax.bitcast_convert_type(bits, jnp.int32) >= round(rate * 2**32) - 2**31


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every bit of the input reaches every bit of the output (MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dropout(x: Float[Array, "..."], words: UInt32[Array, "2"], token: Int[Array, "*B"], rate: float) -> Array:
    return jnp.where(keep_mask(words, token, x.shape[token.ndim :], rate), x, jnp.zeros((), x.dtype))


def _forward(x, words, token, rate):
    return _dropout(x, words, token, rate), (words, token)


def _backward(rate, kept, gradient):
    return _dropout(gradient, *kept, rate), None, None


_dropout.defvjp(_forward, _backward)
