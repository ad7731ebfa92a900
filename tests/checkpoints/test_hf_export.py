"""Exports: bit-exact round trips, merged weights and adapters with the effect they have in transformers and peft."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from cft_jax.checkpoints import from_pretrained, save_pretrained
from cft_jax.common.errors import UserError
from cft_jax.models.config import LoraSpec
from cft_jax.models.layers import LoraParam

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraSpec(rank=3, alpha=5.0, dropout=0.1, targets=ALL)


def llama_config(**changes):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 70.0},
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(sizes | changes))


def load(directory, **options):
    return from_pretrained(directory, **({"dtype": jnp.float32, "param_dtype": jnp.float32} | options))


def randomise_b(model, seed=0):
    """Adapters as after training: B is no longer zero."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, LoraParam)):
        if path[-1] == "b":
            variable.set_value(jnp.asarray(rng.normal(0, 0.05, variable.shape), jnp.float32))
    nnx.update(model, nnx.state(model, LoraParam))
    return model


def tensors(directory):
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bytes(one, other):
    names = sorted(file.name for file in Path(one).glob("model*"))
    assert names == sorted(file.name for file in Path(other).glob("model*"))
    for name in names:
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


IDS = np.random.default_rng(1).integers(0, 89, (2, 21))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact(tmp_path, write_hf, dtype, param_dtype):
    base, out = tmp_path / "base", tmp_path / "out"
    write_hf(base, llama_config(), dtype=dtype, max_shard_size="30KB")
    save_pretrained(load(base, param_dtype=param_dtype), out, format="merged")
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    index = "model.safetensors.index.json"
    assert (base / index).read_bytes() == (out / index).read_bytes()


def test_merged_weights_are_rounded_once(tmp_path, write_hf):
    base, out = tmp_path / "base", tmp_path / "out"
    write_hf(base, llama_config(), dtype="bfloat16", max_shard_size="30KB")
    lora = LoraSpec(rank=3, alpha=5.0, dropout=0.0, targets=("o_proj",))
    model = randomise_b(load(base, param_dtype="bfloat16", lora=lora))
    save_pretrained(model, out, format="merged")
    before, after = tensors(base), tensors(out)
    adapter = model.stacks[0][0].attn.o_proj.lora
    for name, tensor in before.items():
        if ".o_proj." not in name:
            assert torch.equal(tensor, after[name])
            continue
        layer = int(name.split(".")[2])
        a, b = np.asarray(adapter.a[...])[layer].reshape(80, 3), np.asarray(adapter.b[...])[layer]
        exact = tensor.double().numpy() + 5.0 / 3 * (a.astype(np.float64) @ b).T
        ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
        # Half a unit in the last place: one rounding.
        assert (np.abs(after[name].double().numpy() - exact) <= 0.501 * ulp).all()


@pytest.mark.parametrize("tied", [True, False])
def test_merged_and_adapter_have_the_models_logits_in_transformers(tmp_path, write_hf, tied):
    from peft import PeftModel

    base = tmp_path / "base"
    plain = torch_logits(write_hf(base, llama_config(tie_word_embeddings=tied)), IDS)
    model = randomise_b(load(base, lora=LORA))
    expected = np.asarray(model(IDS))
    assert np.abs(expected - plain).max() > 0.1
    save_pretrained(model, tmp_path / "merged", format="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(torch_logits(merged, IDS), expected, atol=1e-4, rtol=0)
    save_pretrained(model, tmp_path / "adapter", format="adapter")
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(wrapped, IDS), expected, atol=1e-4, rtol=0)


def test_trained_weights_are_exported(tmp_path, write_hf):
    write_hf(tmp_path / "base", llama_config(), dtype="bfloat16")
    model = load(tmp_path / "base")
    kernel = model.stacks[0][0].mlp.up_proj.kernel
    kernel.set_value(kernel[...] * 1.1)
    save_pretrained(model, tmp_path / "out", format="merged")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for name, tensor in before.items():
        expected = (tensor.float() * 1.1).bfloat16() if ".up_proj." in name else tensor
        assert torch.equal(after[name], expected), name


def test_exports_take_the_tokenizer_along(tmp_path, write_hf, small_tokenizer):
    base = tmp_path / "base"
    write_hf(base, llama_config())
    small_tokenizer.save_pretrained(base)
    model = randomise_b(load(base, lora=LORA))
    for kind in ("merged", "adapter"):
        save_pretrained(model, tmp_path / kind, format=kind, card="# A card\n")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (tmp_path / kind / name).read_bytes() == (base / name).read_bytes()
        assert (tmp_path / kind / "README.md").read_text() == "# A card\n"
    assert not (tmp_path / "adapter" / "config.json").exists()


def test_config_is_written_in_both_spellings(tmp_path, write_hf):
    base = tmp_path / "base"
    rope = {"rope_type": "linear", "rope_theta": 70.0, "factor": 3.0}
    write_hf(base, llama_config(rope_parameters=rope))
    save_pretrained(load(base), tmp_path / "out", format="merged")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 70.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    assert written["rope_parameters"] == rope


def test_exports_that_would_mislead_are_refused(tmp_path, write_hf):
    write_hf(tmp_path / "base", llama_config())
    model = load(tmp_path / "base", lora=LORA)
    for kind in ("merged", "adapter"):
        with pytest.raises(UserError, match="changes nothing"):
            save_pretrained(model, tmp_path / "out", format=kind)
    with pytest.raises(UserError, match="no adapter"):
        save_pretrained(load(tmp_path / "base"), tmp_path / "out", format="adapter")
    assert not (tmp_path / "out").exists()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(load(tmp_path / "base"), taken, format="merged")
    assert [file.name for file in taken.iterdir()] == ["file"]
