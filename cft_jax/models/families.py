"""From a checkpoint's config.json to a `ModelConfig`: the only module of the model that knows families by name.

Every key of config.json is read, known to leave the mathematics alone (`hf_fields`), or refused by name. Keys that a
file leaves out take the defaults of transformers' config class, which is how transformers itself reads them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.models.config import GatedMlp, LayerSpec, LinearScaling, Llama3Scaling, ModelConfig, Moe, Rope, YarnScaling
from cft_jax.models.hf_fields import Fields
from cft_jax.models.rope_spelling import rope_of

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json.

    Raises:
      UserError: the architecture is unknown, or a field is impossible or not implemented; the message names it.
    """
    model_type = raw.get("model_type")
    if model_type not in _FAMILIES:
        raise UserError(
            f"config.json: model_type={model_type!r} is not implemented; supported: {', '.join(sorted(_FAMILIES))}"
        )
    try:
        return _FAMILIES[model_type](raw)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of config.json that describes the language model: nested in multimodal checkpoints."""
    return raw["text_config"] if is_multimodal(raw) else raw


def is_multimodal(raw: Mapping[str, Any]) -> bool:
    """Whether the checkpoint wraps the language model in one with a vision tower."""
    return raw.get("model_type") == "gemma3"


def _common(f: Fields, rope: Callable[[str], Rope], activation: str) -> dict[str, Any]:
    """What all families spell alike."""
    embed_dim, num_heads = f.number("hidden_size", int), f.number("num_attention_heads", int)
    num_kv_heads = num_heads if f["num_key_value_heads"] is None else f.number("num_key_value_heads", int)
    head_dim = _head_dim(f, embed_dim, num_heads)
    num_layers = f.number("num_hidden_layers", int)
    if f[activation] not in _ACTIVATIONS:
        raise UserError(
            f"config.json: {activation}={f[activation]!r} is not implemented; supported: {', '.join(_ACTIVATIONS)}"
        )
    return {
        "num_layers": num_layers,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": f.number("vocab_size", int),
        "layer_pattern": _pattern(f, num_layers, rope),
        "mlp": GatedMlp(hidden_dim=f.number("intermediate_size", int), activation=_ACTIVATIONS[f[activation]]),
        "norm_eps": f.number("rms_norm_eps", float),
        "attn_scale": head_dim**-0.5,
        "attn_bias": f.flag("attention_bias"),
        "tie_head": f.flag("tie_word_embeddings"),
    }


def _head_dim(f: Fields, embed_dim: int, num_heads: int) -> int:
    if f["head_dim"] is not None:
        return f.number("head_dim", int)
    if embed_dim % num_heads:
        raise UserError(
            f"config.json: hidden_size={embed_dim} is not a multiple of num_attention_heads={num_heads}, "
            "and there is no head_dim"
        )
    return embed_dim // num_heads


def _pattern(f: Fields, num_layers: int, rope: Callable[[str], Rope]) -> tuple[LayerSpec, ...]:
    """The shortest pattern that, repeated, gives every layer's type."""
    types = _layer_types(f, num_layers)
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json: layer_types={types!r} must list {num_layers} times full_attention or sliding_attention"
        )
    window = f.number("sliding_window", int) if "sliding_attention" in types else None
    specs = tuple(LayerSpec(window if kind == "sliding_attention" else None, rope(kind)) for kind in types)
    for period in range(1, num_layers + 1):
        if all(specs[i] == specs[i % period] for i in range(num_layers)):
            return specs[:period]
    raise AssertionError("a list is a repetition of itself")


def _layer_types(f: Fields, num_layers: int) -> list[str]:
    family = f.config_class.model_type
    if family == "llama":
        # Llama has neither; a file that asks for windows means another architecture.
        f.only("sliding_window", (None,))
        return ["full_attention"] * num_layers
    f.read.update(("layer_types", "sliding_window"))
    first, period = num_layers, 2
    if family == "qwen3":
        first = f["max_window_layers"]
        if not f.flag("use_sliding_window"):
            first = num_layers
            if "sliding_attention" in (f.raw.get("layer_types") or ()):
                raise UserError(
                    "config.json: layer_types has sliding_attention and use_sliding_window=False forbids it"
                )
    elif family == "gemma3_text":
        f.read.add("sliding_window_pattern")
        period = f.raw.get("sliding_window_pattern", 6)
    if f.raw.get("layer_types") is not None:
        return list(f.raw["layer_types"])
    if family == "qwen3":
        return ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]


def _llama(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw, "llama")
    rope = rope_of(raw, f.defaults, f.read, "full_attention")
    sizes = _common(f, lambda kind: rope, "hidden_act")
    f.only("mlp_bias", (False,))
    f.only("pretraining_tp", (1, None))
    return f.close(sizes)


def _qwen3(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw, "qwen3")
    rope = rope_of(raw, f.defaults, f.read, "full_attention")
    return f.close(_common(f, lambda kind: rope, "hidden_act") | {"qk_norm": True})


def _gemma3_text(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw, "gemma3_text")
    ropes = {kind: rope_of(raw, f.defaults, f.read, kind) for kind in ("full_attention", "sliding_attention")}
    sizes = _common(f, ropes.__getitem__, "hidden_activation")
    f.only("use_bidirectional_attention", (False, None))
    if f["attn_logit_softcapping"] is not None:
        raise UserError(
            f"config.json: attn_logit_softcapping={f['attn_logit_softcapping']!r} is not implemented for Gemma 3, "
            "where transformers reads it and never applies it; remove the field"
        )
    cap = f["final_logit_softcapping"]
    return f.close(
        sizes
        | {
            "qk_norm": True,
            "post_norms": True,
            "norm_offset": 1.0,
            "embed_scale": sizes["embed_dim"] ** 0.5,
            "attn_scale": f.number("query_pre_attn_scalar", float) ** -0.5,
            "final_softcap": None if cap is None else f.number("final_logit_softcapping", float),
        }
    )


# Fields of the wrapper around Gemma 3's language model that concern images alone.
_IMAGES = frozenset(
    """
    boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id image_token_index mm_tokens_per_image
    text_config vision_config
    """.split()
)


def _gemma3(raw: Mapping[str, Any]) -> ModelConfig:
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"config.json: text_config={text!r} must be a record")
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise UserError(f"config.json: text_config has model_type={text['model_type']!r}; supported: gemma3_text")
    f = Fields(raw, "gemma3")
    f.read |= _IMAGES
    tied = text.get("tie_word_embeddings", True)
    f.only("tie_word_embeddings", (tied,))
    if text.get("final_logit_softcapping") is not None:
        raise UserError(
            f"config.json: final_logit_softcapping={text['final_logit_softcapping']!r} is not implemented for the "
            "multimodal Gemma 3, where transformers never applies it; remove the field"
        )
    f.close({})
    return _gemma3_text(text)


def _gpt_oss(raw: Mapping[str, Any]) -> ModelConfig:
    f = Fields(raw, "gpt_oss")
    rope = rope_of(raw, f.defaults, f.read, "full_attention")
    sizes = _common(f, lambda kind: rope, "hidden_act")
    moe = Moe(
        hidden_dim=f.number("intermediate_size", int),
        num_experts=f.number("num_local_experts", int),
        num_experts_per_token=f.number("num_experts_per_tok", int),
        # transformers 4 has no such fields and computes with these values.
        swiglu_limit=f.number("swiglu_limit", float, default=7.0),
        swiglu_alpha=f.number("swiglu_alpha", float, default=1.702),
    )
    f.only("experts_per_token", (moe.num_experts_per_token,))
    return f.close(sizes | {"mlp": moe, "attn_sinks": True})


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "gemma3": _gemma3,
    "gemma3_text": _gemma3_text,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "qwen3": _qwen3,
}


def _published_llama(layers: int, embed: int, heads: int, head: int) -> ModelConfig:
    scaling = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    return ModelConfig(
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head,
        vocab_size=128_256,
        layer_pattern=(LayerSpec(None, Rope(5e5, scaling)),),
        mlp=GatedMlp(8192, "silu"),
        norm_eps=1e-5,
        attn_scale=head**-0.5,
        tie_head=True,
    )


def _published_qwen3(layers: int, embed: int, heads: int, hidden: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
        layer_pattern=(LayerSpec(None, Rope(1e6)),),
        mlp=GatedMlp(hidden, "silu"),
        norm_eps=1e-6,
        attn_scale=128**-0.5,
        tie_head=tied,
        qk_norm=True,
    )


def _published_gemma3(
    layers: int, embed: int, heads: int, kv_heads: int, head: int, hidden: int, vocab: int, *, window: int, query: int
) -> ModelConfig:
    # The smallest model was not stretched to 128k tokens.
    scaling = LinearScaling(8.0) if window == 1024 else None
    local, full = LayerSpec(window, Rope(1e4)), LayerSpec(None, Rope(1e6, scaling))
    return ModelConfig(
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        vocab_size=vocab,
        layer_pattern=(local,) * 5 + (full,),
        mlp=GatedMlp(hidden, "gelu_tanh"),
        norm_eps=1e-6,
        attn_scale=query**-0.5,
        tie_head=True,
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embed_scale=embed**0.5,
    )


def _published_gpt_oss() -> ModelConfig:
    scaling = YarnScaling(
        factor=32.0, beta_fast=32.0, beta_slow=1.0, original_length=4096, truncate=False,
        attention_factor=0.1 * math.log(32.0) + 1.0,
    )  # fmt: skip
    rope = Rope(1.5e5, scaling)
    return ModelConfig(
        num_layers=24,
        embed_dim=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=201_088,
        layer_pattern=(LayerSpec(128, rope), LayerSpec(None, rope)),
        mlp=Moe(hidden_dim=2880, num_experts=32, num_experts_per_token=4, swiglu_limit=7.0, swiglu_alpha=1.702),
        norm_eps=1e-5,
        attn_scale=64**-0.5,
        tie_head=False,
        attn_bias=True,
        attn_sinks=True,
    )


# The paper's twelve models by hub id; Gemma 3 from 4B up: the language model alone.
PUBLISHED: dict[str, ModelConfig] = {
    "Qwen/Qwen3-0.6B": _published_qwen3(28, 1024, 16, 3072, True),
    "Qwen/Qwen3-1.7B": _published_qwen3(28, 2048, 16, 6144, True),
    "Qwen/Qwen3-4B": _published_qwen3(36, 2560, 32, 9728, True),
    "Qwen/Qwen3-8B": _published_qwen3(36, 4096, 32, 12_288, False),
    "Qwen/Qwen3-14B": _published_qwen3(40, 5120, 40, 17_408, False),
    "meta-llama/Llama-3.2-1B-Instruct": _published_llama(16, 2048, 32, 64),
    "meta-llama/Llama-3.2-3B-Instruct": _published_llama(28, 3072, 24, 128),
    "google/gemma-3-1b-it": _published_gemma3(26, 1152, 4, 1, 256, 6912, 262_144, window=512, query=256),
    "google/gemma-3-4b-it": _published_gemma3(34, 2560, 8, 4, 256, 10_240, 262_208, window=1024, query=256),
    "google/gemma-3-12b-it": _published_gemma3(48, 3840, 16, 8, 256, 15_360, 262_208, window=1024, query=256),
    "google/gemma-3-27b-it": _published_gemma3(62, 5376, 32, 16, 128, 21_504, 262_208, window=1024, query=168),
    "openai/gpt-oss-20b": _published_gpt_oss(),
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
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": config.attn_bias,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp.hidden_dim,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": rope.theta,
        "tie_word_embeddings": config.tie_head,
        "vocab_size": config.vocab_size,
    }
    if config_from_hf(raw) != config:
        raise ValueError(f"{config} is no Llama")
    return raw
