"""Loading checkpoints made by transformers: logits equal to torch's, whatever the files, the padding and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from cft_jax.checkpoints import from_pretrained
from cft_jax.models.config import LoraSpec
from cft_jax.sharding.mesh import make_mesh

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 70.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama_config(**changes):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": dict(LLAMA3_ROPE),
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(sizes | changes))


def qwen3_config(**changes):
    return Qwen3Config(
        vocab_size=89,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        **changes,
    )


def tokens(config, rows=2, length=37, seed=0):
    return np.random.default_rng(seed).integers(0, config.get_text_config().vocab_size, (rows, length))


def torch_logits(model, ids, mask=None):
    with torch.no_grad():
        arguments = {}
        if mask is not None:
            mask = torch.tensor(mask).long()
            arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return model(torch.tensor(ids), **arguments).logits.numpy()


def load(directory, **options):
    return from_pretrained(directory, **({"dtype": jnp.float32, "param_dtype": jnp.float32} | options))


def assert_logits(got, expected):
    assert np.std(expected) > 1
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "shard"),
    [
        (llama_config(), "5GB"),
        (llama_config(tie_word_embeddings=True), "30KB"),
        (llama_config(attention_bias=True), "30KB"),
        (qwen3_config(), "5GB"),
    ],
    ids=["llama", "llama-tied-sharded", "llama-bias", "qwen3"],
)
def test_logits_equal_torch(tmp_path, write_hf, config, shard):
    model = write_hf(tmp_path, config, max_shard_size=shard)
    ids = tokens(config)
    assert_logits(load(tmp_path)(ids), torch_logits(model, ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tmp_path, write_hf, side):
    config = llama_config()
    model = write_hf(tmp_path, config)
    ids = tokens(config)
    mask = np.ones(ids.shape, bool)
    mask[1, :9] = False
    if side == "right":
        mask = mask[:, ::-1].copy()
    got = load(tmp_path)(ids, mask=mask)
    assert_logits(np.asarray(got)[mask], torch_logits(model, ids, mask)[mask])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_half_precision_load_exactly(tmp_path, write_hf, dtype):
    config = llama_config()
    model = write_hf(tmp_path, config, dtype=dtype)
    ids = tokens(config)
    assert_logits(load(tmp_path)(ids), torch_logits(model, ids))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 2, 4)])
@pytest.mark.parametrize("piece_bytes", [2**26, 3000])
def test_meshes_give_the_logits_of_one_device(tmp_path, write_hf, shape, piece_bytes):
    config = llama_config(num_attention_heads=12, num_key_value_heads=4)
    write_hf(tmp_path, config, max_shard_size="30KB")
    ids = tokens(config, rows=8)
    expected = load(tmp_path)(ids)
    model = load(tmp_path, mesh=make_mesh(*shape), piece_bytes=piece_bytes)
    np.testing.assert_allclose(model(ids), expected, atol=1e-5, rtol=0)


def test_fresh_adapters_follow_the_seed_alone(tmp_path, write_hf):
    write_hf(tmp_path, llama_config())
    lora = LoraSpec(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj"))
    one = load(tmp_path, lora=lora, seed=5)
    other = load(tmp_path, lora=lora, seed=5, mesh=make_mesh(1, 2, 4))
    last = load(tmp_path, lora=lora, seed=6)
    a, b, c = (m.stacks[0][0].attn.q_proj.lora.a[...] for m in (one, other, last))
    np.testing.assert_array_equal(a, b)
    assert np.abs(np.asarray(a) - np.asarray(c)).max() > 0.01
    # PEFT: kaiming_uniform(a=sqrt(5)) is uniform within 1/sqrt(fan_in).
    assert 0.9 / 60**0.5 < np.abs(a).max() <= 1 / 60**0.5
    assert not np.any(one.stacks[0][0].attn.q_proj.lora.b[...])
    assert jax.tree.leaves(one.stacks[0][0].mlp.down_proj.lora.a[...])[0].shape == (3, 44, 3)
