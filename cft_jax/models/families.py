"""From a checkpoint's config.json to a `ModelConfig`: the only module of the model that knows families by name.

Every key of config.json is read, known to leave the mathematics alone (`_INERT`), or refused by name. Keys that a file
leaves out take the defaults of transformers' config class, which is how transformers itself reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from cft_jax.common.errors import UserError
from cft_jax.models.config import GatedMlp, LayerSpec, ModelConfig, Rope
from cft_jax.models.rope_spelling import rope_of

# Bookkeeping, training, generation and output options, which change no logits of the published weights.
_INERT = frozenset(
    """
    _name_or_path architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range label2id length_penalty max_length max_position_embeddings
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache _attn_implementation_autoset attention_dropout
    unsloth_fixed unsloth_version initial_context_length
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

    def number(self, name: str, kind: type) -> Any:
        """A positive int or float.

        Raises:
          UserError: the value is something else.
        """
        value = self[name]
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

    def close(self) -> None:
        """Refuses keys that nothing has read."""
        for name, allowed in _ONLY.items():
            self.only(name, allowed)
        unknown = sorted(set(self.raw) - self.read - _INERT)
        if unknown:
            raise UserError(
                f"config.json: {', '.join(f'{name}={self.raw[name]!r}' for name in unknown)} "
                "is not implemented; remove the field if it does not change the model"
            )


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
    f.read.add("sliding_window")
    specs = tuple(LayerSpec(window if kind == "sliding_attention" else None, rope(kind)) for kind in types)
    for period in range(1, num_layers + 1):
        if all(specs[i] == specs[i % period] for i in range(num_layers)):
            return specs[:period]
    raise AssertionError("a list is a repetition of itself")


def _layer_types(f: _Fields, num_layers: int) -> list[str]:
    f.read.update(("layer_types", "sliding_window_pattern", "use_sliding_window", "max_window_layers"))
    if f.raw.get("layer_types") is not None:
        return list(f.raw["layer_types"])
    match f.config_class.model_type:
        case "llama":
            return ["full_attention"] * num_layers
        case "qwen3":
            first = f["max_window_layers"] if f.flag("use_sliding_window") else num_layers
            return ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
        case "gemma3_text":
            period = f.raw.get("sliding_window_pattern", 6)
        case _:
            period = 2
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]


def _llama(raw: Mapping[str, Any]) -> ModelConfig:
    f = _Fields(raw, "llama")
    rope = rope_of(raw, f.defaults, f.read, "full_attention")
    sizes = _common(f, lambda kind: rope, "hidden_act")
    f.only("mlp_bias", (False,))
    f.only("pretraining_tp", (1, None))
    f.only("sliding_window", (None,))
    f.close()
    return ModelConfig(**sizes)


def _qwen3(raw: Mapping[str, Any]) -> ModelConfig:
    f = _Fields(raw, "qwen3")
    rope = rope_of(raw, f.defaults, f.read, "full_attention")
    sizes = _common(f, lambda kind: rope, "hidden_act")
    f.close()
    return ModelConfig(**sizes, qk_norm=True)


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {"llama": _llama, "qwen3": _qwen3}


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
