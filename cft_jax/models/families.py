"""From a checkpoint's config.json to a `ModelConfig`: the only module of the model that knows families by name.

Every key of config.json is read, known to leave the mathematics alone (`hf_fields`), or refused by name. Keys that a
file leaves out take the defaults of transformers' config class, which is how transformers itself reads them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.models.config import GatedMlp, LayerSpec, LinearScaling, Llama3Scaling, ModelConfig, Moe, Rope, YarnScaling
from cft_jax.models.hf_fields import Fields
from cft_jax.models.rope_spelling import ROPE_KEYS, rope_of

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json.

    Raises:
      UserError: the architecture is unknown, or a field is impossible or not implemented; the message names it.
    """
    if is_multimodal(raw):
        raw = _language_model(raw)
    model_type = raw.get("model_type")
    if model_type not in _FAMILIES:
        raise UserError(
            f"config.json: model_type={model_type!r} is not implemented; supported: "
            + ", ".join(sorted([*_FAMILIES, "gemma3"]))
        )
    fields = Fields(raw, model_type)
    sizes = _common(fields) | _FAMILIES[model_type](fields)
    fields.close()
    try:
        return ModelConfig(**sizes)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error


def is_multimodal(raw: Mapping[str, Any]) -> bool:
    """Whether the checkpoint wraps the language model in one with a vision tower."""
    return raw.get("model_type") == "gemma3"


def _common(f: Fields) -> dict[str, Any]:
    """What all families spell alike."""
    embed_dim, num_heads = f.number("hidden_size", int), f.number("num_attention_heads", int)
    activation = "hidden_activation" if f.model_type == "gemma3_text" else "hidden_act"
    if f[activation] not in _ACTIVATIONS:
        raise UserError(
            f"config.json: {activation}={f[activation]!r} is not implemented; supported: {', '.join(_ACTIVATIONS)}"
        )
    if f["head_dim"] is None and embed_dim % num_heads:
        raise UserError(
            f"config.json: hidden_size={embed_dim} is not a multiple of num_attention_heads={num_heads}, "
            "and there is no head_dim"
        )
    head_dim = f.number("head_dim", int, default=embed_dim // num_heads)
    num_layers = f.number("num_hidden_layers", int)
    return {
        "num_layers": num_layers,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": f.number("num_key_value_heads", int, default=num_heads),
        "head_dim": head_dim,
        "vocab_size": f.number("vocab_size", int),
        "layer_pattern": _pattern(f, num_layers),
        "mlp": GatedMlp(hidden_dim=f.number("intermediate_size", int), activation=_ACTIVATIONS[f[activation]]),
        "norm_eps": f.number("rms_norm_eps", float),
        "attn_scale": head_dim**-0.5,
        "attn_bias": f.flag("attention_bias"),
        "tie_head": f.flag("tie_word_embeddings"),
    }


def _pattern(f: Fields, num_layers: int) -> tuple[LayerSpec, ...]:
    """The shortest pattern that, repeated, gives every layer's window and rope."""
    types = _layer_types(f, num_layers)
    if not isinstance(types, list) or len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json: layer_types={types!r} must list {num_layers} times full_attention or sliding_attention"
        )
    f.read |= ROPE_KEYS
    max_length = f.number("max_position_embeddings", int)
    specs = {}
    for kind in set(types):
        # Gemma 3 alone has ropes of its own for the layers with windows.
        rope = rope_of(f.raw, f.defaults, kind if f.model_type == "gemma3_text" else "full_attention", max_length)
        specs[kind] = LayerSpec(f.number("sliding_window", int) if kind == "sliding_attention" else None, rope)
    layers = tuple(specs[kind] for kind in types)
    return next(layers[:n] for n in range(1, num_layers + 1) if layers == (layers[:n] * num_layers)[:num_layers])


def _layer_types(f: Fields, num_layers: int) -> list[str]:
    """As the file lists them, else as transformers' config class works them out."""
    if f.model_type == "llama":
        # Llama has neither; a file that asks for windows means another architecture.
        f.only("sliding_window", (None,))
        return ["full_attention"] * num_layers
    f.read.update(("layer_types", "sliding_window"))
    given = f.raw.get("layer_types")
    if f.model_type == "qwen3":
        first = f["max_window_layers"]
        if not f.flag("use_sliding_window"):
            first = num_layers
            if "sliding_attention" in (given or ()):
                raise UserError(
                    "config.json: layer_types has sliding_attention and use_sliding_window=False forbids it"
                )
        slides = [i >= first for i in range(num_layers)]
    else:
        period = f.number("sliding_window_pattern", int, default=6) if f.model_type == "gemma3_text" else 2
        slides = [(i + 1) % period > 0 for i in range(num_layers)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides] if given is None else given


def _llama(f: Fields) -> dict[str, Any]:
    f.only("mlp_bias", (False,))
    f.only("pretraining_tp", (1, None))
    return {}


def _gemma3_text(f: Fields) -> dict[str, Any]:
    f.only("use_bidirectional_attention", (False, None))
    # transformers reads it and never applies it.
    f.only("attn_logit_softcapping", (None,))
    cap = f["final_logit_softcapping"]
    return {
        "qk_norm": True,
        "post_norms": True,
        "norm_offset": 1.0,
        "embed_scale": f.number("hidden_size", int) ** 0.5,
        "attn_scale": f.number("query_pre_attn_scalar", float) ** -0.5,
        "final_softcap": None if cap is None else f.number("final_logit_softcapping", float),
    }


def _gpt_oss(f: Fields) -> dict[str, Any]:
    moe = Moe(
        hidden_dim=f.number("intermediate_size", int),
        num_experts=f.number("num_local_experts", int),
        num_experts_per_token=f.number("num_experts_per_tok", int),
        # transformers 4 has no such fields and computes with these values.
        swiglu_limit=f.number("swiglu_limit", float, default=7.0),
        swiglu_alpha=f.number("swiglu_alpha", float, default=1.702),
    )
    f.only("experts_per_token", (moe.num_experts_per_token,))
    return {"mlp": moe, "attn_sinks": True}


# What a family adds to what all have in common.
_FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "gemma3_text": _gemma3_text,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "qwen3": lambda _: {"qk_norm": True},
}

# Fields of the wrapper around Gemma 3's language model that concern images alone.
_IMAGES = frozenset(
    """
    boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id image_token_index mm_tokens_per_image
    text_config vision_config
    """.split()
)


def _language_model(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the multimodal Gemma 3 that describes its language model; the wrapper's own keys are checked."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"config.json: text_config={text!r} must be a record")
    text = {"model_type": "gemma3_text", **text}
    if text["model_type"] != "gemma3_text":
        raise UserError(f"config.json: text_config has model_type={text['model_type']!r}; supported: gemma3_text")
    if text.get("final_logit_softcapping") is not None:
        raise UserError(
            f"config.json: final_logit_softcapping={text['final_logit_softcapping']!r} is not implemented for the "
            "multimodal Gemma 3, where transformers never applies it; remove the field"
        )
    wrapper = Fields(raw, "gemma3")
    wrapper.read |= _IMAGES
    wrapper.only("tie_word_embeddings", (text.get("tie_word_embeddings", True),))
    wrapper.close()
    return text


# The paper's twelve models by hub id; Gemma 3 from 4B up: the language model alone.
_LLAMA_1B = ModelConfig(
    num_layers=16, embed_dim=2048, num_heads=32, num_kv_heads=8, head_dim=64, vocab_size=128_256,
    layer_pattern=(LayerSpec(None, Rope(5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192))),),
    mlp=GatedMlp(8192, "silu"), norm_eps=1e-5, attn_scale=64**-0.5, tie_head=True,
)  # fmt: skip
_QWEN_06B = ModelConfig(
    num_layers=28, embed_dim=1024, num_heads=16, num_kv_heads=8, head_dim=128, vocab_size=151_936,
    layer_pattern=(LayerSpec(None, Rope(1e6)),),
    mlp=GatedMlp(3072, "silu"), norm_eps=1e-6, attn_scale=128**-0.5, tie_head=True, qk_norm=True,
)  # fmt: skip
_GEMMA_1B = ModelConfig(
    num_layers=26, embed_dim=1152, num_heads=4, num_kv_heads=1, head_dim=256, vocab_size=262_144,
    layer_pattern=(LayerSpec(512, Rope(1e4)),) * 5 + (LayerSpec(None, Rope(1e6)),),
    mlp=GatedMlp(6912, "gelu_tanh"), norm_eps=1e-6, attn_scale=256**-0.5, tie_head=True, qk_norm=True,
    post_norms=True, norm_offset=1.0, embed_scale=1152**0.5,
)  # fmt: skip
_YARN = YarnScaling(
    factor=32.0, beta_fast=32.0, beta_slow=1.0, original_length=4096, truncate=False,
    attention_factor=0.1 * math.log(32.0) + 1.0,
)  # fmt: skip
_GPT_OSS_20B = ModelConfig(
    num_layers=24, embed_dim=2880, num_heads=64, num_kv_heads=8, head_dim=64, vocab_size=201_088,
    layer_pattern=(LayerSpec(128, Rope(1.5e5, _YARN)), LayerSpec(None, Rope(1.5e5, _YARN))),
    mlp=Moe(hidden_dim=2880, num_experts=32, num_experts_per_token=4, swiglu_limit=7.0, swiglu_alpha=1.702),
    norm_eps=1e-5, attn_scale=64**-0.5, tie_head=False, attn_bias=True, attn_sinks=True,
)  # fmt: skip


def _qwen(layers: int, embed: int, heads: int, hidden: int, *, tied: bool) -> ModelConfig:
    sizes = {"num_layers": layers, "embed_dim": embed, "num_heads": heads, "tie_head": tied}
    return dataclasses.replace(_QWEN_06B, **sizes, mlp=GatedMlp(hidden, "silu"))


def _gemma(layers: int, embed: int, heads: int, kv_heads: int, head: int, hidden: int, query: int) -> ModelConfig:
    """From 4B up, stretched to 128k tokens and with the images' tokens."""
    sizes = {"num_layers": layers, "embed_dim": embed, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head}
    layer_pattern = (LayerSpec(1024, Rope(1e4)),) * 5 + (LayerSpec(None, Rope(1e6, LinearScaling(8.0))),)
    scales = {"attn_scale": query**-0.5, "embed_scale": embed**0.5}
    mlp = GatedMlp(hidden, "gelu_tanh")
    return dataclasses.replace(_GEMMA_1B, **sizes, **scales, vocab_size=262_208, layer_pattern=layer_pattern, mlp=mlp)


PUBLISHED: dict[str, ModelConfig] = {
    "Qwen/Qwen3-0.6B": _QWEN_06B,
    "Qwen/Qwen3-1.7B": _qwen(28, 2048, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen(36, 2560, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen(36, 4096, 32, 12_288, tied=False),
    "Qwen/Qwen3-14B": _qwen(40, 5120, 40, 17_408, tied=False),
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B-Instruct": dataclasses.replace(
        _LLAMA_1B, num_layers=28, embed_dim=3072, num_heads=24, head_dim=128, attn_scale=128**-0.5
    ),
    "google/gemma-3-1b-it": _GEMMA_1B,
    "google/gemma-3-4b-it": _gemma(34, 2560, 8, 4, 256, 10_240, 256),
    "google/gemma-3-12b-it": _gemma(48, 3840, 16, 8, 256, 15_360, 256),
    "google/gemma-3-27b-it": _gemma(62, 5376, 32, 16, 128, 21_504, 168),
    "openai/gpt-oss-20b": _GPT_OSS_20B,
}


def llama_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model that Llama can express, in both spellings of the rotary embedding.

    Raises:
      ValueError: it cannot.
    """
    rope = config.layer_pattern[0].rope
    if not isinstance(config.mlp, GatedMlp) or rope.scaling is not None:
        raise ValueError(f"{config} is no Llama with an unscaled rotary embedding")
    raw = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": config.attn_bias, "head_dim": config.head_dim,
        "hidden_act": "silu", "hidden_size": config.embed_dim, "intermediate_size": config.mlp.hidden_dim,
        "model_type": "llama", "num_attention_heads": config.num_heads, "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads, "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": "default"}, "rope_scaling": None,
        "rope_theta": rope.theta, "tie_word_embeddings": config.tie_head, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if config_from_hf(raw) != config:
        raise ValueError(f"{config} is no Llama")
    return raw
