"""Grouped products against products group by group, forward and backward; the TPU's kernel runs interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.models.grouped_product import grouped_product


@pytest.mark.parametrize("tpu", [False, True])
def test_equals_a_product_per_group(tpu):
    """Empty groups, groups that end within the kernel's tiles, sizes that no tile divides, rows of no group."""
    sizes, M, K, N = np.array([150, 0, 3, 0, 107]), 300, 24, 40
    rng = np.random.default_rng(0)
    x, kernels, gradient = (rng.normal(size=shape).astype(np.float32) for shape in ((M, K), (5, K, N), (M, N)))
    y, backward = jax.vjp(
        lambda x, kernels: grouped_product(x, kernels, jnp.asarray(sizes), tpu, interpret=True),
        jnp.asarray(x),
        jnp.asarray(kernels),
    )
    to_x, to_kernels = backward(jnp.asarray(gradient))
    ends = np.cumsum(sizes)
    for kernel, to_kernel, start, end in zip(kernels, to_kernels, ends - sizes, ends, strict=True):
        np.testing.assert_allclose(y[start:end], x[start:end] @ kernel, atol=1e-4)
        np.testing.assert_allclose(to_x[start:end], gradient[start:end] @ kernel.T, atol=1e-4)
        np.testing.assert_allclose(to_kernel, x[start:end].T @ gradient[start:end], atol=1e-4)
    assert not np.any(y[ends[-1] :]) and not np.any(to_x[ends[-1] :])
