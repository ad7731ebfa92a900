"""Rotary frequencies equal to transformers' for every scaling, far beyond the original lengths.

Expected values: transformers' rotary embedding modules in float32, computed here.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cft_jax.models.families import config_from_hf
from cft_jax.models.rope import cos_sin, inverse_frequencies, rotate

ROPES = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 3.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 7.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1.5e5,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0},
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "mscale": 0.9,
        "mscale_all_dim": 0.4,
        "original_max_position_embeddings": 512,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "attention_factor": 1.21,
        "beta_slow": 0.25,
        "original_max_position_embeddings": 256,
    },
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 4.0, "beta_slow": 4.0, "truncate": True},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_angles_equal_transformers(rope, head_dim):
    config = LlamaConfig(
        hidden_size=head_dim * 3,
        num_attention_heads=3,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(rope),
    )
    theirs = LlamaRotaryEmbedding(config)
    ours = config_from_hf(config.to_dict()).layer_pattern[0].rope
    inverse, amplitude = inverse_frequencies(ours, head_dim)
    # torch's float32 power is off by one bit here and there, which bits depends on the CPU; ramps magnify that.
    ramp = rope["rope_type"] in ("llama3", "yarn")
    np.testing.assert_array_max_ulp(inverse, theirs.inv_freq.numpy(), maxulp=16 if ramp else 3)
    assert amplitude == pytest.approx(theirs.attention_scaling, rel=1e-12)
    positions = np.array([[0, 1, 2, 17, 63, 64, 70]])
    expected = theirs(torch.zeros(1), torch.tensor(positions))
    signs = np.repeat([-1, 1], head_dim // 2)
    for mine, of_torch, sign in zip(cos_sin(ours, head_dim, jnp.asarray(positions)), expected, (1, signs), strict=True):
        # Angles up to 70 of frequencies three units in the last place apart: 70 * 3 * 2^-23 = 2.5e-5, times 1.4.
        np.testing.assert_allclose(mine, of_torch.numpy() * sign, atol=4e-5, rtol=0)


def test_rotation_equals_transformers():
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=dict(ROPES[0]))
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(torch.tensor(q), torch.tensor(q), cos, sin, unsqueeze_dim=2)
    rope = config_from_hf(config.to_dict()).layer_pattern[0].rope
    got = rotate(jnp.asarray(q), *cos_sin(rope, 8, jnp.asarray(positions)))
    # The same with angles up to 7, times vectors up to 4.
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5, rtol=0)
