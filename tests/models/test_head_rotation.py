"""The kernel of norm and rotation against the same in two steps, run as ordinary operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.models.attention import normed_and_rotated
from cft_jax.models.config import GatedMlp, LayerSpec, ModelConfig, Rope
from cft_jax.models.head_rotation import Factors, by_kernel
from cft_jax.models.layers import RmsNorm
from cft_jax.models.rope import cos_sin
from cft_jax.sharding.mesh import make_mesh

CONFIG = ModelConfig(
    num_layers=1,
    embed_dim=768,
    num_heads=6,
    num_kv_heads=6,
    head_dim=128,
    vocab_size=8,
    layer_pattern=(LayerSpec(None, Rope(1e4)),),
    mlp=GatedMlp(8, "silu"),
    norm_eps=1e-6,
    attn_scale=1.0,
    tie_head=True,
)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("mesh", [None, (2, 1, 2)])
def test_kernel_equals_norm_and_rotation(normed, mesh):
    mesh = None if mesh is None else make_mesh(*mesh, devices=jax.devices()[:4])
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (2, 600, 6, 128)), 1 + jax.random.normal(keys[1], (128,)) / 4
    direction = jax.random.normal(keys[2], x.shape)
    factors = cos_sin(Rope(1e4), 128, jnp.arange(1200).reshape(2, 600))

    def plain(x, weight):
        norm = RmsNorm(CONFIG, 128, None, jnp.float32) if normed else None
        if norm is not None:
            norm.scale[...] = weight
        return jnp.sum(normed_and_rotated(x, norm, factors, None) * direction)

    def kernel(x, weight):
        scale = weight[None] if normed else None
        y = by_kernel(jnp.swapaxes(x, 1, 2), Factors(*factors, scale), 1e-6, mesh, interpret=True)
        return jnp.sum(jnp.swapaxes(y, 1, 2) * direction)

    want, want_gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, weight)
    got, gradients = jax.jit(jax.value_and_grad(kernel, argnums=(0, 1)))(x, weight)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for ours, theirs in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * float(jnp.abs(theirs).max()) + 1e-7)
