"""The random model from which training starts: readable by transformers, the same for the same seed."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cft_jax.checkpoints import from_pretrained, write_random_llama
from cft_jax.models.config import GatedMlp, LayerSpec, ModelConfig, Rope


def config(**changes):
    sizes = {
        "num_layers": 3,
        "embed_dim": 24,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "layer_pattern": (LayerSpec(None, Rope(5000.0)),),
        "mlp": GatedMlp(40, "silu"),
        "norm_eps": 1e-5,
        "attn_scale": 8**-0.5,
        "tie_head": True,
    }
    return ModelConfig(**(sizes | changes))


def write(directory, **changes):
    options = {"config": config(), "seed": 3, "dtype": "float32", "eos_token_id": 5, "max_length": 64} | changes
    write_random_llama(directory, **options)


def test_transformers_reads_the_same_model(tmp_path):
    write(tmp_path)
    model = from_pretrained(tmp_path, dtype="float32", param_dtype="float32")
    assert model.config == config()
    ids = np.random.default_rng(0).integers(0, 61, (2, 19))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids), expected, atol=1e-4, rtol=0)
    assert theirs.config.eos_token_id == 5
    assert theirs.dtype == torch.float32


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, seed=seed, dtype=jnp.bfloat16)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_what_llama_cannot_express_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no Llama"):
        write(tmp_path, config=config(qk_norm=True))
