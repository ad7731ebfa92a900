"""Gradients of every adapter matrix against torch and peft in float32, for every family and rematerialisation."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model

from cft_jax.checkpoints import from_pretrained
from cft_jax.checkpoints.lora_weights import adapter_tensors
from cft_jax.models.layers import LoraParam

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
IDS = np.random.default_rng(1).integers(0, 85, (2, 23))

pytestmark = pytest.mark.filterwarnings("ignore:.*target_parameters:UserWarning")


@nnx.jit
def our_gradients(model, ids, weights):
    def loss(model):
        length = jnp.full(ids.shape, ids.shape[1])
        hidden, _ = model.hidden(ids, jnp.arange(ids.shape[1])[None].repeat(2, 0), length)
        return jnp.sum(model.logits(hidden) * weights)

    return nnx.grad(loss, argnums=nnx.DiffState(0, LoraParam))(model)


@pytest.mark.parametrize(
    ("family", "remat", "options"),
    [
        ("llama", "none", {"target_modules": DENSE}),
        ("qwen3", "full", {"target_modules": DENSE}),
        ("gemma3_text", "dots", {"target_modules": DENSE}),
        (
            "gpt_oss",
            "full",
            {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        ),
    ],
)
def test_gradients_equal_torch(tmp_path, write_hf, hf_config, family, remat, options):
    changes = {} if family != "gemma3_text" else {"num_hidden_layers": 3, "layer_types": GEMMA_LAYERS}
    config = hf_config(family, **changes)
    theirs = get_peft_model(
        write_hf(tmp_path / "base", config), LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    weights = np.random.default_rng(2).normal(size=(*IDS.shape, config.vocab_size)).astype(np.float32)
    (theirs(input_ids=torch.tensor(IDS)).logits * torch.tensor(weights)).sum().backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}

    model = from_pretrained(
        tmp_path / "base", dtype="float32", param_dtype="float32", adapter=tmp_path / "adapter", remat=remat
    )
    gradients = dict(nnx.to_flat_state(our_gradients(model, jnp.asarray(IDS), jnp.asarray(weights))))
    checked = 0
    for target in adapter_tensors(model.config, model.lora_spec):
        a, b = (np.asarray(gradients[(*target.path, w)].get_value())[target.name.layer] for w in ("a", "b"))
        if target.experts:
            # The outputs of gate and up are interleaved there.
            b = b.swapaxes(-1, -2).reshape(*b.shape[:2], -1)
            a, b = a.transpose(0, 2, 1).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1)
        else:
            a, b = a.reshape(-1, 3).T, b.reshape(3, -1).T
        for factor, ours in (("lora_A", a), ("lora_B", b)):
            of_torch = expected[f"base_model.model.{target.module}.{factor}.default.weight"]
            error = np.linalg.norm(ours - of_torch) / np.linalg.norm(of_torch)
            assert error <= 1e-3, (target.module, factor, error)
            checked += 1
    assert checked == len(expected)
