"""Exports: bit-exact round trips, merged weights and adapters with the effect they have in transformers and peft."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cft_jax.checkpoints import from_pretrained, save_pretrained
from cft_jax.common.errors import UserError
from cft_jax.evaluate.metrics.sound import pooled_chi_square
from cft_jax.models.config import LoraSpec
from cft_jax.models.layers import LoraParam

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraSpec(rank=3, alpha=5.0, dropout=0.1, targets=ALL)


def load(directory, **options):
    return from_pretrained(directory, **({"dtype": jnp.float32, "param_dtype": jnp.float32} | options))


def randomise_b(model, scale=0.05):
    """Adapters as after training: B is no longer zero."""
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, LoraParam)):
        if path[-1] == "b":
            variable.set_value(jnp.asarray(rng.normal(0, scale, variable.shape), jnp.float32))
    return model


def tensors(directory):
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


IDS = np.random.default_rng(1).integers(0, 89, (2, 21))


@pytest.mark.parametrize(
    ("family", "dtype", "param_dtype"),
    [
        ("llama", "float32", "bfloat16"),
        ("llama", "float16", "float32"),
        ("qwen3", "bfloat16", "bfloat16"),
        ("gemma3_text", "float32", "float32"),
        ("gemma3", "bfloat16", "bfloat16"),
        ("gpt_oss", "bfloat16", "float32"),
    ],
)
def test_round_trip_is_bit_exact(tmp_path, write_hf, hf_config, family, dtype, param_dtype):
    base, out = tmp_path / "base", tmp_path / "out"
    write_hf(base, hf_config(family), dtype=dtype, max_shard_size="30KB")
    save_pretrained(load(base, param_dtype=param_dtype), out, format="merged")
    files = sorted(file.name for file in base.glob("model*"))
    assert len(files) > 2
    assert files == sorted(file.name for file in out.glob("model*"))
    for name in files:
        assert (base / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_both_namings_of_multimodal_checkpoints(tmp_path, write_hf, hf_config, prefix):
    base, out = tmp_path / "base", tmp_path / "out"
    theirs = write_hf(base, hf_config("gemma3"))
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        if prefix == "language_model.model.":
            name = name.replace("model.language_model.", prefix).replace("model.vision_tower", "vision_tower")
            name = name.replace("model.multi_modal", "multi_modal")
        renamed[name] = tensor.contiguous()
    assert any(name.startswith(prefix) for name in renamed)
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    model = randomise_b(load(base, lora=LoraSpec(rank=3, alpha=5.0, dropout=0.0, targets=("q_proj",))))
    expected = np.asarray(model(IDS))
    save_pretrained(model, out, format="merged")
    after = tensors(out)
    assert after.keys() == renamed.keys()
    for name, tensor in renamed.items():
        changed = prefix in name and "q_proj" in name
        assert torch.equal(after[name], tensor) != changed, name
    merged = type(theirs).from_pretrained(out, dtype=torch.float32)
    np.testing.assert_allclose(torch_logits(merged, IDS), expected, atol=1e-4, rtol=0)


def test_merged_weights_are_rounded_once(tmp_path, write_hf, hf_config):
    base, out = tmp_path / "base", tmp_path / "out"
    write_hf(base, hf_config("llama"), dtype="bfloat16", max_shard_size="30KB")
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


def test_trained_weights_are_exported(tmp_path, write_hf, hf_config):
    write_hf(tmp_path / "base", hf_config("llama"), dtype="bfloat16")
    model = load(tmp_path / "base")
    kernel = model.stacks[0][0].mlp.up_proj.kernel
    kernel.set_value(kernel[...] * 1.1)
    save_pretrained(model, tmp_path / "out", format="merged")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for name, tensor in before.items():
        expected = (tensor.float() * 1.1).bfloat16() if ".up_proj." in name else tensor
        assert torch.equal(after[name], expected), name


def test_a_tied_head_that_the_files_repeat_stays_tied(tmp_path, write_hf, hf_config):
    """As in some published Qwen3 files; transformers 5 unties a stored head that differs from the embedding."""
    base, out = tmp_path / "base", tmp_path / "out"
    write_hf(base, hf_config("qwen3"), dtype="bfloat16")
    file = base / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    model = load(base)
    save_pretrained(model, tmp_path / "same", format="merged")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == file.read_bytes()
    model.embed.set_value(jnp.asarray(-model.embed[...]))
    save_pretrained(model, out, format="merged")
    after = tensors(out)
    assert torch.equal(after["lm_head.weight"], -stored["model.embed_tokens.weight"])
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    np.testing.assert_allclose(torch_logits(theirs, IDS), model(IDS), atol=1e-4, rtol=0)
    save_file(after | {"lm_head.weight": after["lm_head.weight"] * 1.5}, out / "model.safetensors")
    with pytest.raises(UserError, match="holds other numbers"):
        load(out)


def test_exports_take_the_tokenizer_along(tmp_path, write_hf, hf_config, small_tokenizer):
    base = tmp_path / "base"
    write_hf(base, hf_config("llama"))
    small_tokenizer.save_pretrained(base)
    model = randomise_b(load(base, lora=LORA))
    for kind in ("merged", "adapter"):
        save_pretrained(model, tmp_path / kind, format=kind, card="# A card\n")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (tmp_path / kind / name).read_bytes() == (base / name).read_bytes()
        assert (tmp_path / kind / "README.md").read_text() == "# A card\n"
    assert not (tmp_path / "adapter" / "config.json").exists()


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=3, alpha=3.0, dropout=0.0, targets=("up_proj",))])
def test_how_much_of_an_update_survives_rounding(tmp_path, write_hf, hf_config, lora):
    """Weights of 1: bfloat16 has steps of 1/128 above 1, and half a step or less is lost."""
    base = tmp_path / "base"
    write_hf(base, hf_config("llama", num_hidden_layers=1), dtype="bfloat16")
    stored = load_file(base / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    stored[up] = torch.ones_like(stored[up])
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})

    def trained(sizes):
        model = load(base, lora=lora)
        layer = model.stacks[0][0].mlp.up_proj
        update = np.zeros(layer.kernel.shape, np.float32)
        update[..., : len(sizes)] = sizes
        if lora is None:
            layer.kernel.set_value(layer.kernel[...] + update)
        else:
            layer.lora.a.set_value(jnp.zeros_like(layer.lora.a[...]).at[..., 0].set(1.0))
            layer.lora.b.set_value(jnp.zeros_like(layer.lora.b[...]).at[:, 0].set(update[:, 0]))
        return model

    # By hand: of a column of s = 1/64 and n of 1/300, 1 / (1 + n (64/300)^2) is kept.
    step, lost = 1 / 64, 1 / 300
    for n, share in ((1, "95.6%"), (6, "78.6%")):
        save_pretrained(trained([step] + [lost] * n), tmp_path / share, format="merged", card="# A card\n")
        card = (tmp_path / share / "README.md").read_text()
        assert card.startswith("# A card\n") and f"rounding to bfloat16 keeps {share} of the training" in card
    with pytest.raises(UserError, match=r"bfloat16 keeps 33\.8% of the training's update; export with .*dtype float32"):
        save_pretrained(trained([step] + [lost] * 43), tmp_path / "out", format="merged")
    save_pretrained(trained([step] + [lost] * 43), tmp_path / "out", format="merged", dtype="float32")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[up]
    assert written.dtype == torch.float32
    np.testing.assert_allclose(written[:, 0] - 1, [step] + [lost] * 43, rtol=1e-5)


def test_another_tokenizer_replaces_the_bases(tmp_path, write_hf, hf_config, small_tokenizer):
    base, other = tmp_path / "base", tmp_path / "other"
    write_hf(base, hf_config("llama", num_hidden_layers=1))
    small_tokenizer.save_pretrained(base)
    small_tokenizer.add_tokens(["<extra>"])
    small_tokenizer.chat_template = None
    small_tokenizer.save_pretrained(other)
    save_pretrained(load(base), tmp_path / "out", format="merged", tokenizer=str(other))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_generate_samples_from_the_models_own_distribution(tmp_path, write_hf, hf_config):
    """Two tokens of `generate` as it stands, beside our probabilities: a chi-square test over all pairs."""
    base, out = tmp_path / "base", tmp_path / "out"
    write_hf(base, hf_config("llama", eos_token_id=5))
    theirs = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "min_new_tokens": 1}
    record = {"_from_model_config": True, "do_sample": True, "eos_token_id": 5, "pad_token_id": 7, "max_length": 33}
    (base / "generation_config.json").write_text(json.dumps(record | theirs))
    save_pretrained(randomise_b(load(base, lora=LORA)), out, format="merged", card="# A card\n")
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {
        **{"eos_token_id": [5], "pad_token_id": 7, "max_length": 33},
        **{"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    }
    named = ", ".join(f"`{name}` {value}" for name, value in theirs.items())
    assert f"`generation_config.json` had {named}." in (out / "README.md").read_text()

    prompt, draws = IDS[0], 3000
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor(prompt[None])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "num_return_sequences": draws}
    rows = model.generate(ids, do_sample=True, **options)
    first, second = rows[:, prompt.size :].T.numpy()
    ours = load(out)
    vocabulary = np.arange(ours.config.vocab_size)
    longer = np.concatenate([np.tile(prompt, (vocabulary.size, 1)), vocabulary[:, None]], axis=1)
    logits = np.asarray(ours(longer))[:, -2:].astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    exact = np.exp(log_probs[0, 0][:, None] + log_probs[:, 1])
    counts = np.zeros_like(exact)
    np.add.at(counts, (first, second), 1)
    # The first token may end the text; padding follows.
    assert set(second[first == 5]) == {7} and (first == 5).any()
    _, pvalue, cells = pooled_chi_square(
        *(np.append(np.delete(pairs, 5, axis=0).ravel(), pairs[5].sum()) for pairs in (counts, exact))
    )
    assert cells > 100 and pvalue > 1e-3


def test_config_is_written_in_both_spellings(tmp_path, write_hf, hf_config):
    base = tmp_path / "base"
    rope = {"rope_type": "linear", "rope_theta": 70.0, "factor": 3.0}
    write_hf(base, hf_config("llama", rope_parameters=rope))
    save_pretrained(load(base), tmp_path / "out", format="merged")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 70.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    assert written["rope_parameters"] == rope


def test_exports_that_would_mislead_are_refused(tmp_path, write_hf, hf_config):
    write_hf(tmp_path / "base", hf_config("llama"))
    model = load(tmp_path / "base", lora=LORA)
    for kind in ("merged", "adapter"):
        with pytest.raises(UserError, match="changes nothing"):
            save_pretrained(model, tmp_path / "out", format=kind)
    tiny = randomise_b(load(tmp_path / "base", lora=LORA), scale=1e-12)
    with pytest.raises(UserError, match=r"keeps 0.0% of the training's update; export with format adapter or"):
        save_pretrained(tiny, tmp_path / "out", format="merged")
    with pytest.raises(UserError, match="no adapter"):
        save_pretrained(load(tmp_path / "base"), tmp_path / "out", format="adapter")
    assert not (tmp_path / "out").exists()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(load(tmp_path / "base"), taken, format="merged")
    assert [file.name for file in taken.iterdir()] == ["file"]
