"""Every field of a model's config acts: another value gives other logits, or weights of another shape."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cft_jax.models import config as records
from cft_jax.models.config import GatedMlp, LayerSpec, LinearScaling, Llama3Scaling, ModelConfig, Moe, Rope, YarnScaling

LLAMA3 = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=24)
YARN = YarnScaling(factor=4.0, beta_fast=4.0, beta_slow=0.5, original_length=24, truncate=False, attention_factor=1.2)
BASE = ModelConfig(
    num_layers=2,
    embed_dim=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=31,
    layer_pattern=(LayerSpec(5, Rope(50.0, YARN)), LayerSpec(None, Rope(400.0, LLAMA3))),
    mlp=GatedMlp(20, "silu"),
    norm_eps=1e-5,
    attn_scale=6**-0.5,
    tie_head=True,
)
MOE = Moe(hidden_dim=10, num_experts=5, num_experts_per_token=2, swiglu_limit=0.7, swiglu_alpha=1.7)
WITH_EXPERTS = dataclasses.replace(BASE, mlp=MOE)
LINEAR = dataclasses.replace(BASE, layer_pattern=(LayerSpec(None, Rope(50.0, LinearScaling(4.0))),))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 24)))


def layer(config, **changes):
    first, *rest = config.layer_pattern
    return {"layer_pattern": (dataclasses.replace(first, **changes), *rest)}


def rope(index, **changes):
    specs = list(BASE.layer_pattern)
    specs[index] = dataclasses.replace(specs[index], rope=dataclasses.replace(specs[index].rope, **changes))
    return {"layer_pattern": tuple(specs)}


def yarn(**changes):
    return rope(0, scaling=dataclasses.replace(YARN, **changes))


def llama3(**changes):
    return rope(1, scaling=dataclasses.replace(LLAMA3, **changes))


def moe(**changes):
    return {"mlp": dataclasses.replace(MOE, **changes)}


# (record, field): (config that is changed, what is changed)
CHANGES = {
    ("ModelConfig", "num_layers"): (BASE, {"num_layers": 3}),
    ("ModelConfig", "embed_dim"): (BASE, {"embed_dim": 14}),
    ("ModelConfig", "num_heads"): (BASE, {"num_heads": 6}),
    ("ModelConfig", "num_kv_heads"): (BASE, {"num_kv_heads": 1}),
    ("ModelConfig", "head_dim"): (BASE, {"head_dim": 8}),
    ("ModelConfig", "vocab_size"): (BASE, {"vocab_size": 33}),
    ("ModelConfig", "layer_pattern"): (BASE, {"layer_pattern": BASE.layer_pattern[::-1]}),
    ("ModelConfig", "mlp"): (BASE, {"mlp": MOE}),
    ("ModelConfig", "norm_eps"): (BASE, {"norm_eps": 0.1}),
    ("ModelConfig", "attn_scale"): (BASE, {"attn_scale": 0.9}),
    ("ModelConfig", "tie_head"): (BASE, {"tie_head": False}),
    ("ModelConfig", "qk_norm"): (BASE, {"qk_norm": True}),
    ("ModelConfig", "post_norms"): (BASE, {"post_norms": True}),
    ("ModelConfig", "norm_offset"): (BASE, {"norm_offset": 1.0}),
    ("ModelConfig", "embed_scale"): (BASE, {"embed_scale": 3.0}),
    ("ModelConfig", "attn_bias"): (BASE, {"attn_bias": True}),
    ("ModelConfig", "attn_sinks"): (BASE, {"attn_sinks": True}),
    ("ModelConfig", "attn_softcap"): (BASE, {"attn_softcap": 0.2}),
    ("ModelConfig", "final_softcap"): (BASE, {"final_softcap": 0.7}),
    ("LayerSpec", "window"): (BASE, layer(BASE, window=4)),
    ("LayerSpec", "rope"): (BASE, layer(BASE, rope=Rope(60.0))),
    ("Rope", "theta"): (BASE, rope(0, theta=51.0)),
    ("Rope", "scaling"): (BASE, rope(0, scaling=None)),
    ("LinearScaling", "factor"): (LINEAR, layer(LINEAR, rope=Rope(50.0, LinearScaling(5.0)))),
    ("Llama3Scaling", "factor"): (BASE, llama3(factor=5.0)),
    ("Llama3Scaling", "low_freq_factor"): (BASE, llama3(low_freq_factor=0.7)),
    ("Llama3Scaling", "high_freq_factor"): (BASE, llama3(high_freq_factor=3.0)),
    ("Llama3Scaling", "original_length"): (BASE, llama3(original_length=30)),
    ("YarnScaling", "factor"): (BASE, yarn(factor=5.0)),
    ("YarnScaling", "beta_fast"): (BASE, yarn(beta_fast=2.0)),
    ("YarnScaling", "beta_slow"): (BASE, yarn(beta_slow=1.0)),
    ("YarnScaling", "original_length"): (BASE, yarn(original_length=30)),
    ("YarnScaling", "truncate"): (BASE, yarn(truncate=True)),
    ("YarnScaling", "attention_factor"): (BASE, yarn(attention_factor=1.3)),
    ("GatedMlp", "hidden_dim"): (BASE, {"mlp": GatedMlp(22, "silu")}),
    ("GatedMlp", "activation"): (BASE, {"mlp": GatedMlp(20, "gelu_tanh")}),
    ("Moe", "hidden_dim"): (WITH_EXPERTS, moe(hidden_dim=12)),
    ("Moe", "num_experts"): (WITH_EXPERTS, moe(num_experts=6)),
    ("Moe", "num_experts_per_token"): (WITH_EXPERTS, moe(num_experts_per_token=3)),
    ("Moe", "swiglu_limit"): (WITH_EXPERTS, moe(swiglu_limit=0.4)),
    ("Moe", "swiglu_alpha"): (WITH_EXPERTS, moe(swiglu_alpha=1.0)),
}


def weights(model):
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def test_no_field_is_forgotten():
    fields = {
        (record.__name__, field.name)
        for record in vars(records).values()
        if dataclasses.is_dataclass(record) and record is not records.LoraSpec
        for field in dataclasses.fields(record)
    }
    assert set(CHANGES) == fields


@pytest.fixture(scope="module")
def before(random_model):
    models = {config: random_model(config) for config in (BASE, LINEAR, WITH_EXPERTS)}
    return {config: (weights(model), np.asarray(model(TOKENS))) for config, model in models.items()}


@pytest.mark.parametrize("field", CHANGES, ids=".".join)
def test_field_acts(field, before, random_model):
    config, changes = CHANGES[field]
    changed = dataclasses.replace(config, **changes)
    assert changed != config
    old, logits = before[config]
    model = random_model(changed)
    if {path: value.shape for path, value in old.items()} != {p: v.shape for p, v in weights(model).items()}:
        return
    assert np.abs(np.asarray(random_model(changed, weights=old)(TOKENS)) - logits).max() > 1e-3
