"""Activations layer by layer, against transformers and against the scanned forward pass."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cft_jax.checkpoints import from_pretrained
from cft_jax.models.debug import layer_outputs

IDS = np.random.default_rng(0).integers(0, 85, (2, 19))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_every_layer_equals_transformers(tmp_path, write_hf, hf_config, family):
    config = hf_config(family)
    theirs = write_hf(tmp_path, config)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(IDS), output_hidden_states=True).hidden_states
    model = from_pretrained(tmp_path, dtype="float32", param_dtype="float32")
    tokens = jnp.asarray(IDS)
    positions = jnp.arange(19)[None].repeat(2, 0)
    *inner, _, normed = outputs = nnx.jit(layer_outputs)(model, tokens, positions, jnp.full((2, 19), 19))
    assert len(outputs) == config.num_hidden_layers + 2
    for layer, (ours, of_torch) in enumerate(zip([*inner, normed], expected, strict=True)):
        scale = np.abs(of_torch.numpy()).max()
        np.testing.assert_allclose(ours / scale, of_torch.numpy() / scale, atol=1e-5, rtol=0, err_msg=str(layer))
