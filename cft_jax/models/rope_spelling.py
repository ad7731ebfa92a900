"""The two spellings of rotary embeddings in config.json, read into one record.

transformers 4 writes `rope_theta` and `rope_scaling` (Gemma 3 also `rope_local_base_freq`), transformers 5
`rope_parameters`, nested by layer type where layers differ. A file may carry both; they must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.models.config import LinearScaling, Llama3Scaling, Rope, YarnScaling

ROPE_KEYS = frozenset({"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def rope_of(raw: Mapping[str, Any], defaults: Mapping[str, Any], layer_type: str, max_length: int) -> Rope:
    """The rotary embedding of the layers of one type ("full_attention" or "sliding_attention").

    `raw` is the record of config.json, `defaults` that of transformers' config class, each in either spelling;
    `max_length` is `max_position_embeddings`, the original length where the file names no other.

    Raises:
      UserError: a field is missing, impossible or not implemented, or the two spellings contradict each other.
    """
    local = layer_type == "sliding_attention" and (_is_nested(raw) or _is_nested(defaults))
    default = _new_spelling(defaults, layer_type) or _old_spelling(defaults, local)
    new, old = _new_spelling(raw, layer_type), _old_spelling(raw, local)
    base = default if new is None else {"rope_theta": old.get("rope_theta", default.get("rope_theta")), **new}
    # A scaling in the old spelling replaces the base's; without one, only theta does.
    scaled = not local and bool(raw.get("rope_scaling"))
    rope = _rope(({"rope_theta": base.get("rope_theta")} if scaled else base) | old, max_length)
    if new is not None and rope != _rope(base, max_length):
        raise UserError(
            f"config.json: rope_parameters and rope_theta, rope_scaling contradict each other for {layer_type}; "
            "remove one of the two spellings"
        )
    return rope


def _is_nested(record: Mapping[str, Any]) -> bool:
    """Whether the ropes differ by layer type."""
    return bool(_LAYER_TYPES & set(record.get("rope_parameters") or {})) or "rope_local_base_freq" in record


def _new_spelling(record: Mapping[str, Any], layer_type: str) -> dict[str, Any] | None:
    """`rope_parameters` of one layer type; None where it is not given."""
    parameters = record.get("rope_parameters")
    if not parameters:
        return None
    if not isinstance(parameters, Mapping):
        raise UserError(f"config.json: rope_parameters={parameters!r} must be a record")
    if not _LAYER_TYPES & set(parameters):
        return dict(parameters)
    if set(parameters) - _LAYER_TYPES:
        extra = ", ".join(sorted(set(parameters) - _LAYER_TYPES))
        raise UserError(f"config.json: rope_parameters has {extra} beside layer types; give them by layer type")
    inner = parameters.get(layer_type)
    return None if inner is None else dict(inner)


def _old_spelling(record: Mapping[str, Any], local: bool) -> dict[str, Any]:
    """The same from `rope_theta` and `rope_scaling`, or from `rope_local_base_freq`; only what is given."""
    theta = record.get("rope_local_base_freq" if local else "rope_theta")
    scaling = None if local else record.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise UserError(f"config.json: rope_scaling={scaling!r} must be a record")
    return ({} if theta is None else {"rope_theta": theta}) | dict(scaling or {})


def with_both_spellings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with its rotary embeddings in both spellings, for transformers 4 and 5 alike.

    transformers 4 does not know `rope_parameters` and would take an unscaled rope without a word.
    """
    if isinstance(raw.get("text_config"), Mapping):
        return {**raw, "text_config": with_both_spellings(raw["text_config"])}
    full, nested = _new_spelling(raw, "full_attention"), _is_nested(raw)
    if full is None and raw.get("rope_theta") is None:
        # The class's own defaults, on which both versions agree.
        return dict(raw)
    if full is None:
        full = _with_type(_old_spelling(raw, local=False))
        local = {"rope_type": "default", **_old_spelling(raw, local=True)}
        return {**raw, "rope_parameters": {"full_attention": full, "sliding_attention": local} if nested else full}
    scaling = _with_type(full)
    theta = {name: scaling.pop(name) for name in ("rope_theta",) if name in scaling}
    local = _new_spelling(raw, "sliding_attention") if nested else None
    local_theta = {"rope_local_base_freq": local["rope_theta"]} if local and "rope_theta" in local else {}
    return {**raw, **theta, "rope_scaling": None if scaling["rope_type"] == "default" else scaling, **local_theta}


def _with_type(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_type": parameters.get("type") or "default", **parameters}


def _rope(given: Mapping[str, Any], max_length: int) -> Rope:
    """One record of rope parameters, every key of which must be honoured."""
    left = _with_type(given)
    left.pop("type", None)
    kind, theta = left.pop("rope_type") or "default", _number(left, "rope_theta")
    if left.pop("partial_rotary_factor", None) not in (None, 1):
        raise UserError(
            f"config.json: partial_rotary_factor={given['partial_rotary_factor']!r} is not implemented; supported: 1"
        )
    # transformers ignores it for ropes that need none; some published files carry it.
    original = int(left.pop("original_max_position_embeddings", None) or max_length)
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(_number(left, "factor"))
    elif kind == "llama3":
        low, high = _number(left, "low_freq_factor"), _number(left, "high_freq_factor")
        scaling = Llama3Scaling(_number(left, "factor"), low, high, original)
    elif kind == "yarn":
        scaling = _yarn(left, original, max_length)
    else:
        raise UserError(f"config.json: rope_type={kind!r} is not implemented; supported: default, linear, llama3, yarn")
    if left:
        raise UserError(f"config.json: {', '.join(sorted(left))} of rope type {kind!r} is not implemented")
    return Rope(theta, scaling)


def _yarn(left: dict[str, Any], original: int, max_length: int) -> YarnScaling:
    """YaRN as transformers reads it (modeling_rope_utils.py, _compute_yarn_parameters)."""
    factor = max_length / original if left.get("factor") is None else _number(left, "factor")
    left.pop("factor", None)
    mscale, mscale_all = left.pop("mscale", None), left.pop("mscale_all_dim", None)
    amplitude = left.pop("attention_factor", None)
    if amplitude is None:
        both = bool(mscale and mscale_all)
        amplitude = _mscale(factor, mscale) / _mscale(factor, mscale_all) if both else _mscale(factor, 1.0)
    truncate = left.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"config.json: truncate={truncate!r} of rope type 'yarn' must be true or false")
    return YarnScaling(
        factor=factor,
        beta_fast=float(left.pop("beta_fast", None) or 32),
        beta_slow=float(left.pop("beta_slow", None) or 1),
        original_length=original,
        truncate=truncate,
        attention_factor=float(amplitude),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(left: dict[str, Any], name: str) -> float:
    value = left.pop(name, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"config.json: {name}={value!r} of the rotary embedding must be a positive number")
    return float(value)
