"""Adapters in both directions: the effect in transformers and peft is the effect here, for every family.

Expected values: torch, transformers and peft in float32 on CPU, computed here; tolerance 1e-4.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cft_jax.checkpoints import from_pretrained, save_pretrained
from cft_jax.common.errors import UserError
from cft_jax.models.config import LoraSpec
from cft_jax.models.layers import LoraParam

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EXPERTS = (*ATTENTION, "gate_up_proj", "down_proj")
IDS = np.random.default_rng(1).integers(0, 85, (2, 23))

pytestmark = pytest.mark.filterwarnings("ignore:.*target_parameters:UserWarning")


def load(directory, **options):
    return from_pretrained(directory, **({"dtype": jnp.float32, "param_dtype": jnp.float32} | options))


def randomise_b(model, seed=0):
    """Adapters as after training: B is no longer zero."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, LoraParam)):
        if path[-1] == "b":
            variable.set_value(jnp.asarray(rng.normal(0, 0.1, variable.shape), jnp.float32))
    return model


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits.numpy()


def write_peft(model, directory, **options):
    """A random adapter made by peft; returns the wrapped model."""
    options = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "target_modules": list(DENSE)} | options
    wrapped = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    wrapped.save_pretrained(directory)
    return wrapped


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"use_rslora": True}),
        ("qwen3", {"target_modules": "all-linear"}),
        ("gemma3_text", {"target_modules": ["o_proj", "down_proj"]}),
        ("gemma3", {"target_modules": r".*language_model.*\.(q_proj|up_proj)"}),
        ("gpt_oss", {"target_modules": list(ATTENTION)}),
        (
            "gpt_oss",
            {
                "target_modules": ["v_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
        ),
        ("gpt_oss", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
)
def test_import_has_pefts_effect(tmp_path, write_hf, hf_config, family, options):
    theirs = write_hf(tmp_path / "base", hf_config(family))
    plain = torch_logits(theirs)
    wrapped = write_peft(theirs, tmp_path / "adapter", **options)
    expected = torch_logits(wrapped)
    assert np.abs(expected - plain).max() > 0.1
    model = load(tmp_path / "base", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(model(IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", DENSE),
        ("qwen3", ("k_proj", "gate_proj")),
        ("gemma3_text", DENSE),
        ("gemma3", DENSE),
        ("gpt_oss", EXPERTS),
        ("gpt_oss", ("down_proj",)),
    ],
)
def test_exports_have_our_effect(tmp_path, write_hf, hf_config, family, targets):
    theirs = write_hf(tmp_path / "base", hf_config(family))
    plain = torch_logits(theirs)
    lora = LoraSpec(rank=3, alpha=7.0, dropout=0.1, targets=targets)
    model = randomise_b(load(tmp_path / "base", lora=lora))
    expected = np.asarray(model(IDS))
    assert np.abs(expected - plain).max() > 0.1
    save_pretrained(model, tmp_path / "adapter", format="adapter")
    save_pretrained(model, tmp_path / "merged", format="merged")
    wrapped = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(wrapped), expected, atol=1e-4, rtol=0)
    again = load(tmp_path / "base", adapter=tmp_path / "adapter")
    np.testing.assert_array_equal(again(IDS), expected)
    merged = getattr(transformers, model.source.config["architectures"][0]).from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(merged), expected, atol=1e-4, rtol=0)


def test_gemma_adapters_work_in_the_wrapper_and_in_the_language_model(tmp_path, write_hf, hf_config):
    wrapper = write_hf(tmp_path / "base", hf_config("gemma3"))
    language = transformers.Gemma3ForCausalLM(wrapper.config.text_config)
    inner = {name.replace("language_model.", ""): tensor for name, tensor in wrapper.state_dict().items()}
    language.load_state_dict({name: inner[name] for name in language.state_dict()})
    lora = LoraSpec(rank=3, alpha=7.0, dropout=0.1, targets=("q_proj", "o_proj"))
    model = randomise_b(load(tmp_path / "base", lora=lora))
    expected = np.asarray(model(IDS))
    save_pretrained(model, tmp_path / "adapter", format="adapter")
    for theirs in (wrapper, language):
        wrapped = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        np.testing.assert_allclose(torch_logits(wrapped), expected, atol=1e-4, rtol=0)
        adapted = {name for name, _ in wrapped.named_modules() if name.endswith("lora_A")}
        assert len(adapted) == 2 * language.config.num_hidden_layers
        assert not any("vision" in name for name in adapted)


def test_an_adapters_directory_stands_for_its_base_and_itself(tmp_path, write_hf, hf_config):
    write_hf(tmp_path / "base", hf_config("llama"))
    lora = LoraSpec(rank=3, alpha=7.0, dropout=0.25, targets=("q_proj",))
    model = randomise_b(load(tmp_path / "base", lora=lora))
    save_pretrained(model, tmp_path / "adapter", format="adapter")
    again = load(tmp_path / "adapter")
    np.testing.assert_array_equal(again(IDS), model(IDS))
    assert again.lora_spec == lora
    assert again.source == model.source


def change(name, value):
    def edit(directory):
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return edit


def rekey(edit_tensors):
    def edit(directory):
        file = directory / "adapter_model.safetensors"
        save_file(edit_tensors(load_file(file)), file)

    return edit


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("use_dora", True), "use_dora=True is not implemented"),
        (change("rank_pattern", {"q_proj": 5}), "rank_pattern"),
        (change("layers_to_transform", [0]), "layers_to_transform"),
        (change("modules_to_save", ["lm_head"]), "modules_to_save"),
        (change("bias", "all"), "bias='all'"),
        (change("init_lora_weights", "pissa"), "init_lora_weights='pissa'"),
        (change("peft_type", "IA3"), "peft_type='IA3'"),
        (change("r", 0), "r=0"),
        (change("r", 4), r"q_proj.lora_A has shape \[3, 60\], the model needs \[4, 60\]"),
        (rekey(lambda t: {name: value for name, value in t.items() if name != FIRST}), "missing .*layers.0.*lora_A"),
        (rekey(lambda t: {name.replace("layers.0", "layers.7"): value for name, value in t.items()}), "layers.7"),
        (rekey(lambda t: {name: value * 0 for name, value in t.items()}), "changes nothing"),
        (rekey(lambda t: {name.replace("lora_A", "lora_E"): value for name, value in t.items()}), "no LoRA weight"),
        (lambda directory: (directory / "adapter_model.safetensors").unlink(), "never loaded"),
        (lambda directory: (directory / "adapter_config.json").write_text("{"), "half-written"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path, write_hf, hf_config, edit, message):
    theirs = write_hf(tmp_path / "base", hf_config("llama", num_hidden_layers=1))
    write_peft(theirs, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    edit(tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_lora_and_adapter_must_agree(tmp_path, write_hf, hf_config):
    theirs = write_hf(tmp_path / "base", hf_config("llama", num_hidden_layers=1))
    write_peft(theirs, tmp_path / "adapter", target_modules=["q_proj"])
    spec = LoraSpec(rank=3, alpha=7.0, dropout=0.2, targets=("q_proj",))
    model = load(tmp_path / "base", adapter=tmp_path / "adapter", lora=spec)
    assert model.lora_spec == spec
    with pytest.raises(UserError, match="rank 4"):
        other = LoraSpec(rank=4, alpha=7.0, dropout=0.2, targets=("q_proj",))
        load(tmp_path / "base", adapter=tmp_path / "adapter", lora=other)
    with pytest.raises(UserError, match="adapts q_proj"):
        other = LoraSpec(rank=3, alpha=7.0, dropout=0.2, targets=("v_proj",))
        load(tmp_path / "base", adapter=tmp_path / "adapter", lora=other)
    with pytest.raises(UserError, match="linear layers are down_proj, gate_proj"):
        load(tmp_path / "base", lora=LoraSpec(rank=3, alpha=7.0, dropout=0.2, targets=("router",)))
