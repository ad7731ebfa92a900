"""The adapters' strength: 0 is the base, between it scales what they add; a model without any is refused."""

import jax
import numpy as np
import pytest
from flax import nnx

from cft_jax.common.errors import UserError
from cft_jax.models.config import GatedMlp, LayerSpec, LoraSpec, ModelConfig, Rope
from cft_jax.models.strength import set_strength
from cft_jax.models.transformer import Transformer
from cft_jax.train.state import without_adapters

TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def small_model(targets):
    config = ModelConfig(
        num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=6, vocab_size=30,
        layer_pattern=(LayerSpec(None, Rope(1e4)),), mlp=GatedMlp(20, "silu"), norm_eps=1e-5, attn_scale=6**-0.5,
        tie_head=True,
    )  # fmt: skip
    spec = LoraSpec(rank=2, alpha=4.0, dropout=0.0, targets=targets) if targets else None
    model = Transformer(config, lora=spec, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "b":
            variable.set_value(0.3 * jax.random.normal(jax.random.key(len(path)), variable.shape))
            nnx.update(model, nnx.from_flat_state([(path, variable)]))
    return model


def test_what_adapters_add_is_scaled():
    model = small_model(("q_proj", "down_proj"))
    whole, base = np.asarray(model(TOKENS)), np.asarray(without_adapters(model)(TOKENS))
    assert np.abs(whole - base).max() > 0.1
    set_strength(model, 0.5, name="it")
    half = np.asarray(model(TOKENS))
    assert model.lora_spec.alpha == 2.0 and not np.allclose(half, whole) and not np.allclose(half, base)
    halved = small_model(("q_proj", "down_proj"))
    for path, variable in nnx.to_flat_state(nnx.state(halved)):
        if path[-1] == "b":
            variable.set_value(0.5 * variable.get_value())
            nnx.update(halved, nnx.from_flat_state([(path, variable)]))
    np.testing.assert_allclose(half, np.asarray(halved(TOKENS)), atol=1e-5)
    set_strength(model, 0.0, name="it")
    np.testing.assert_allclose(np.asarray(model(TOKENS)), base, atol=1e-6)


def test_a_model_without_adapters_is_refused():
    model = small_model(())
    set_strength(model, 1.0, name="exported")
    with pytest.raises(UserError, match=r"strength=0\.5 is of .* adapters, and exported has none; leave it at"):
        set_strength(model, 0.5, name="exported")
