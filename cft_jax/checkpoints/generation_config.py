"""generation_config.json: which tokens end a text, and the settings by which others sample from an export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cft_jax.checkpoints.tensor_files import read_record, write_record

GENERATION = "generation_config.json"
# Draws from the model's own distribution. transformers takes the 50 most probable tokens where no top-k is named, and
# 0 alone stands for none.
_AS_TRAINED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
# What else changes the distribution, in transformers 4.57 and 5, vLLM or SGLang.
_RESHAPING = frozenset(
    """
    bad_words_ids begin_suppress_tokens constraints diversity_penalty dola_layers early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    force_words_ids forced_bos_token_id forced_eos_token_id frequency_penalty guidance_scale length_penalty min_length
    min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams penalty_alpha presence_penalty
    repetition_penalty sequence_bias suppress_tokens top_h top_n_sigma typical_p watermarking_config
    """.split()
)
_SPECIAL_TOKENS = ("bos_token_id", "pad_token_id")


def named_stop_ids(directory: Path) -> list[int]:
    """The tokens that end a text, by generation_config.json or, without one, by config.json; empty without either.

    Raises:
      UserError: the file is damaged.
    """
    named = _record(directory).get("eos_token_id")
    return named if isinstance(named, list) else [] if named is None else [named]


def write_generation_config(origin: Path, out: Path, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Writes the file of an export, by which `generate` and servers draw from the distribution that was trained.

    Args:
      origin: the base checkpoint, whose other settings stay.
      out: directory of the export.
      stop_ids: tokens that end a text, besides those that the base names.

    Returns:
      The sampling settings of the base that are left out.
    """
    base = _record(origin)
    if not (origin / GENERATION).is_file():
        base = {name: base[name] for name in _SPECIAL_TOKENS if name in base}
    left_out = {name: base[name] for name in base if name in _RESHAPING or name in _AS_TRAINED}
    # `_from_model_config` lets transformers take old settings in config.json instead.
    kept = {name: base[name] for name in base if name not in left_out and name != "_from_model_config"}
    if ends := list(dict.fromkeys([*named_stop_ids(origin), *stop_ids])):
        kept["eos_token_id"] = ends
    write_record(out / GENERATION, kept | _AS_TRAINED)
    return {name: value for name, value in left_out.items() if value not in (None, _AS_TRAINED.get(name))}


def _record(directory: Path) -> Mapping[str, Any]:
    file = next((directory / name for name in (GENERATION, "config.json") if (directory / name).is_file()), None)
    return {} if file is None else read_record(file)
