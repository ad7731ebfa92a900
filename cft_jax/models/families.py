"""From a checkpoint's config.json to a `ModelConfig`: the only module of the model that knows families by name.

Every key of config.json is read, known to leave the mathematics alone (`_INERT`), or refused by name. Keys that a file
leaves out take the defaults of transformers' config class, which is how transformers itself reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from cft_jax.common.errors import UserError
from cft_jax.models.config import GatedMlp, LayerSpec, ModelConfig, Moe, Rope
from cft_jax.models.rope_spelling import rope_of

# Bookkeeping, training, generation and output options, which change no logits of the published weights.
_INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path _sliding_window_pattern architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initial_context_length initializer_range label2id length_penalty max_length max_position_embeddings min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type quantization_config
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
# Options of other architectures that any config.json may carry; honouring them would need code that is not here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class _Fields:
    """The keys of one config.json record, each of which must be accounted for."""

    def __init__(self, raw: Mapping[str, Any], model_type: str) -> None:
        self.raw = raw
        self.config_class = CONFIG_MAPPING[model_type]
        self.defaults = self.config_class().to_dict()
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The file's value, or the class's default where the file has no such key."""
        self.read.add(name)
        return self.raw[name] if name in self.raw else self.defaults.get(name)

    def number(self, name: str, kind: type, default: float | None = None) -> Any:
        """A positive int or float; `default` is for fields that the config class of some versions lacks.

        Raises:
          UserError: the value is something else.
        """
        value = default if self[name] is None else self[name]
        allowed = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or value <= 0:
            raise UserError(f"config.json: {name}={value!r} must be a positive {kind.__name__}")
        return kind(value)

    def flag(self, name: str) -> bool:
        value = self[name]
        if not isinstance(value, bool):
            raise UserError(f"config.json: {name}={value!r} must be true or false")
        return value

    def only(self, name: str, allowed: Sequence[Any]) -> None:
        """Refuses every value but those that the code honours; an absent key is always one of them."""
        self.read.add(name)
        if name in self.raw and self.raw[name] not in allowed:
            raise UserError(
                f"config.json: {name}={self.raw[name]!r} is not implemented; supported: "
                + ", ".join(repr(value) for value in allowed)
            )

    def close(self, sizes: Mapping[str, Any]) -> Any:
        """The config of these fields, if every key of the file is accounted for.

        Raises:
          UserError: nothing has read a key, which might change the model.
        """
        for name, allowed in _ONLY.items():
            self.only(name, allowed)
        unknown = sorted(set(self.raw) - self.read - _INERT)
        if unknown:
            raise UserError(
                f"config.json: {', '.join(f'{name}={self.raw[name]!r}' for name in unknown)} "
                "is not implemented; remove the field if it does not change the model"
            )
        return ModelConfig(**sizes) if sizes else None


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


def _common(f: _Fields, rope: Callable[[str], Rope], activation: str) -> dict[str, Any]:
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


def _head_dim(f: _Fields, embed_dim: int, num_heads: int) -> int:
    # LlamaConfig derives it, so that its own default (of another width) must not be taken.
    derived = f.config_class.model_type == "llama" and "head_dim" not in f.raw
    if not derived and f["head_dim"] is not None:
        return f.number("head_dim", int)
    f.read.add("head_dim")
    if embed_dim % num_heads:
        raise UserError(
            f"config.json: hidden_size={embed_dim} is not a multiple of num_attention_heads={num_heads}, "
            "and there is no head_dim"
        )
    return embed_dim // num_heads


def _pattern(f: _Fields, num_layers: int, rope: Callable[[str], Rope]) -> tuple[LayerSpec, ...]:
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


def _layer_types(f: _Fields, num_layers: int) -> list[str]:
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
    f = _Fields(raw, "llama")
    rope = rope_of(raw, f.defaults, f.read, "full_attention")
    sizes = _common(f, lambda kind: rope, "hidden_act")
    f.only("mlp_bias", (False,))
    f.only("pretraining_tp", (1, None))
    return f.close(sizes)


def _qwen3(raw: Mapping[str, Any]) -> ModelConfig:
    f = _Fields(raw, "qwen3")
    rope = rope_of(raw, f.defaults, f.read, "full_attention")
    return f.close(_common(f, lambda kind: rope, "hidden_act") | {"qk_norm": True})


def _gemma3_text(raw: Mapping[str, Any]) -> ModelConfig:
    f = _Fields(raw, "gemma3_text")
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
    f = _Fields(raw, "gemma3")
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
    f = _Fields(raw, "gpt_oss")
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
