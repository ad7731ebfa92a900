"""Rows sorted by group, each times the matrix of its group, without a product of every row with every matrix.

XLA has kernels for TPUs for `jax.lax.ragged_dot` and its gradient to the rows, but computes the gradient to the
matrices densely, in as many times the operations as there are groups; there JAX's own kernel (megablox) does it.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cft_jax.models.layers import matmul_precision

# Rows, and values of either dimension of a matrix, that the kernel takes at a time at most; and rows at least.
_ROWS, _COLUMNS, _LEAST_ROWS = 512, 512, 128


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_product(
    x: Float[Array, "M I"],
    kernels: Float[Array, "E I O"],
    group_sizes: Int[Array, "E"],
    tpu: bool,
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """The products, in the operands' dtype with float32 sums.

    Args:
      x: rows of the first group, of the second, and so on.
      kernels: of the groups.
      group_sizes: how many rows each group has.
      tpu: whether the gradient to `kernels` takes the TPU's kernel.
      interpret: run that as ordinary operations, on any device.
    """
    return jax.lax.ragged_dot(x, kernels, group_sizes, precision=matmul_precision(x.dtype))


def _forward(x, kernels, group_sizes, tpu, interpret):
    return grouped_product(x, kernels, group_sizes, tpu, interpret), (x, kernels, group_sizes)


def _backward(tpu, interpret, kept, gradient):
    x, kernels, group_sizes = kept
    product = partial(jax.lax.ragged_dot, precision=matmul_precision(x.dtype))
    to_x = product(gradient, jnp.swapaxes(kernels, 1, 2), group_sizes)
    if tpu:
        to_kernels = _to_kernels(x, gradient, group_sizes, kernels.dtype, interpret)
    else:
        (to_kernels,) = jax.linear_transpose(lambda kernels: product(x, kernels, group_sizes), kernels)(gradient)
    return to_x, to_kernels, None


grouped_product.defvjp(_forward, _backward)


def _to_kernels(
    x: Float[Array, "M I"], gradient: Float[Array, "M O"], group_sizes: Int[Array, "E"], dtype, interpret: bool
) -> Float[Array, "E I O"]:
    # Not needed, nor everywhere to be had, without a TPU.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows = max(math.gcd(x.shape[0], _ROWS), _LEAST_ROWS)
    # Rows of no group, as the kernel takes whole tiles.
    x, gradient = (jnp.pad(rows_, ((0, -rows_.shape[0] % rows), (0, 0))) for rows_ in (x, gradient))
    tiling = rows, min(x.shape[1], _COLUMNS), min(gradient.shape[1], _COLUMNS)
    return tgmm(
        jnp.swapaxes(x, 0, 1),
        gradient,
        group_sizes.astype(jnp.int32),
        preferred_element_type=dtype,
        tiling=tiling,
        interpret=interpret,
    )
