"""Rows sorted by group, each times the matrix of its group, without a product of every row with every matrix.

XLA has a kernel for TPUs for `jax.lax.ragged_dot`. Its gradient to the matrices it computes densely, in as many times
the operations as there are groups, and for that to the rows it copies the matrices, transposed; JAX's own kernels
(megablox) do neither.
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
      tpu: whether the gradients take the TPU's kernels.
      interpret: run these as ordinary operations, on any device.
    """
    return jax.lax.ragged_dot(x, kernels, group_sizes, precision=matmul_precision(x.dtype))


def _forward(x, kernels, group_sizes, tpu, interpret):
    return grouped_product(x, kernels, group_sizes, tpu, interpret), (x, kernels, group_sizes)


def _backward(tpu, interpret, kept, gradient):
    x, kernels, group_sizes = kept
    if tpu:
        return *_by_kernels(x, kernels, group_sizes, gradient, interpret), None
    product = partial(jax.lax.ragged_dot, precision=matmul_precision(x.dtype))
    to_x = product(gradient, jnp.swapaxes(kernels, 1, 2), group_sizes)
    (to_kernels,) = jax.linear_transpose(lambda kernels: product(x, kernels, group_sizes), kernels)(gradient)
    return to_x, to_kernels, None


grouped_product.defvjp(_forward, _backward)


def _by_kernels(
    x: Float[Array, "M I"],
    kernels: Float[Array, "E I O"],
    group_sizes: Int[Array, "E"],
    gradient: Float[Array, "M O"],
    interpret: bool,
) -> tuple[Float[Array, "M I"], Float[Array, "E I O"]]:
    """The gradients to rows and matrices."""
    # Not needed, nor everywhere to be had, without a TPU.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    count, inputs, outputs = x.shape[0], min(x.shape[1], _COLUMNS), min(gradient.shape[1], _COLUMNS)
    rows = max(math.gcd(count, _ROWS), _LEAST_ROWS)
    # Rows of no group, as the kernels take whole tiles.
    x, gradient = (jnp.pad(rows_, ((0, -count % rows), (0, 0))) for rows_ in (x, gradient))
    group_sizes = group_sizes.astype(jnp.int32)
    to_x = gmm(
        gradient,
        kernels,
        group_sizes,
        preferred_element_type=x.dtype,
        tiling=(rows, outputs, inputs),
        transpose_rhs=True,
        interpret=interpret,
    )
    to_kernels = tgmm(
        jnp.swapaxes(x, 0, 1),
        gradient,
        group_sizes,
        preferred_element_type=kernels.dtype,
        tiling=(rows, inputs, outputs),
        interpret=interpret,
    )
    # The kernel leaves rows of no group as they were.
    of_a_group = jnp.arange(count) < jnp.sum(group_sizes)
    return jnp.where(of_a_group[:, None], to_x[:count], 0), to_kernels
