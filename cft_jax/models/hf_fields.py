"""The keys of a config.json, every one of which must be read, known to be inert, or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from cft_jax.common.errors import UserError

# Bookkeeping, training, generation and output options, which change no logits of the published weights.
_INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path _sliding_window_pattern architectures attention_dropout
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


class Fields:
    """The keys of one config.json record, each of which must be accounted for."""

    def __init__(self, raw: Mapping[str, Any], model_type: str) -> None:
        self.raw, self.model_type = raw, model_type
        self.config_class = CONFIG_MAPPING[model_type]
        # Llama's class works these out from its other fields: no default for a file with other values there.
        derived = ("head_dim", "num_key_value_heads") if model_type == "llama" else ()
        self.defaults = self.config_class().to_dict() | dict.fromkeys(derived)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The file's value, or the class's default where the file has no such key."""
        self.read.add(name)
        return self.raw[name] if name in self.raw else self.defaults.get(name)

    def number(self, name: str, kind: type, default: int | float | None = None) -> Any:
        """A positive int or float; `default` is for fields that may be null, or that some versions' class lacks.

        Raises:
          UserError: the value is something else.
        """
        value = default if self[name] is None else self[name]
        allowed = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or value <= 0:
            raise UserError(f"config.json: {name}={value!r} must be a positive {kind.__name__}")
        return kind(value)

    def flag(self, name: str) -> bool:
        if not isinstance(value := self[name], bool):
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
        """Refuses what nothing has read, which might change the model.

        Raises:
          UserError: there is such a key, or one asks for code or an architecture that is not here.
        """
        self.read.add("auto_map")
        if any(name.startswith("AutoModel") for name in self.raw.get("auto_map") or ()):
            raise UserError("config.json: auto_map names code that comes with the checkpoint, which is never run")
        for name, allowed in _ONLY.items():
            self.only(name, allowed)
        unknown = sorted(name for name in set(self.raw) - self.read - _INERT if self.raw[name] is not None)
        if unknown:
            raise UserError(
                f"config.json: {', '.join(f'{name}={self.raw[name]!r}' for name in unknown)} "
                "is not implemented; remove the field if it does not change the model"
            )
