"""The two spellings of rotary embeddings in config.json, read into one record.

transformers 4 writes `rope_theta` and `rope_scaling` (Gemma 3 also `rope_local_base_freq`), transformers 5
`rope_parameters`, nested by layer type where layers differ. A file may carry both; they must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.models.config import LinearScaling, Llama3Scaling, Rope, YarnScaling

_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def rope_of(raw: Mapping[str, Any], defaults: Mapping[str, Any], read: set[str], layer_type: str) -> Rope:
    """The rotary embedding of the layers of one type.

    Args:
      raw: the record of config.json.
      defaults: of transformers' config class.
      read: names of the fields that have been read; those of this function are added.
      layer_type: "full_attention" or "sliding_attention".

    Raises:
      UserError: a field is missing, impossible or not implemented, or the two spellings contradict each other.
    """
    read.update(_KEYS)
    local = layer_type == "sliding_attention" and (_nested(raw) or _nested(defaults))
    theta_key = "rope_local_base_freq" if local else "rope_theta"
    default = _by_layer_type(defaults, layer_type) or _old_scaling(defaults, local) or {}
    theta = _first(raw.get(theta_key), default.get("rope_theta"), defaults.get(theta_key), 10_000.0)
    length = _first(raw.get("max_position_embeddings"), defaults["max_position_embeddings"])
    new, scaling = _by_layer_type(raw, layer_type), _old_scaling(raw, local)
    if new is None:
        return _rope({"rope_theta": theta, **(scaling or {**default, "rope_theta": theta})}, length)
    rope = _rope({"rope_theta": theta, **new}, length)
    other = rope if scaling is None else _rope({"rope_theta": theta, **scaling}, length)
    if other != rope or _first(raw.get(theta_key), rope.theta) != rope.theta:
        raise UserError(
            f"config.json: rope_parameters and {theta_key}, rope_scaling contradict each other for {layer_type}; "
            "remove one of the two spellings"
        )
    return rope


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _nested(record: Mapping[str, Any]) -> bool:
    """Whether the ropes differ by layer type."""
    return bool(_LAYER_TYPES & set(record.get("rope_parameters") or {})) or "rope_local_base_freq" in record


def _by_layer_type(record: Mapping[str, Any], layer_type: str) -> dict[str, Any] | None:
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


def _old_scaling(record: Mapping[str, Any], local: bool) -> dict[str, Any] | None:
    scaling = None if local else record.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise UserError(f"config.json: rope_scaling={scaling!r} must be a record")
    return dict(scaling) if scaling else None


def with_both_spellings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with its rotary embeddings in both spellings, for transformers 4 and 5 alike.

    transformers 4 does not know `rope_parameters` and would take an unscaled rope without a word.
    """
    if isinstance(raw.get("text_config"), Mapping):
        return {**raw, "text_config": with_both_spellings(raw["text_config"])}
    out = dict(raw)
    full = _by_layer_type(raw, "full_attention")
    local = _by_layer_type(raw, "sliding_attention") if _nested(raw) else None
    if full is not None:
        # From the new spelling to the old one.
        out |= _old_spelling(full)
        if local is not None and "rope_theta" in local:
            out["rope_local_base_freq"] = local["rope_theta"]
        return out
    scaling, theta = _old_scaling(raw, False), raw.get("rope_theta")
    if theta is None:
        # The class's own defaults, on which both versions agree.
        return out
    full = {"rope_theta": theta, **_with_type(scaling or {})}
    if "rope_local_base_freq" in raw:
        local = {"rope_theta": raw["rope_local_base_freq"], "rope_type": "default"}
        return out | {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    return out | {"rope_parameters": full}


def _old_spelling(parameters: Mapping[str, Any]) -> dict[str, Any]:
    scaling = {key: value for key, value in _with_type(parameters).items() if key != "rope_theta"}
    theta = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
    return {**theta, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def _with_type(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_type": parameters.get("type") or "default", **parameters}


def _rope(given: Mapping[str, Any], max_length: int) -> Rope:
    """One record of rope parameters, every key of which must be honoured."""
    left = dict(given)
    kind = left.pop("rope_type", None)
    legacy = left.pop("type", None)
    kind = kind or legacy or "default"
    theta = _number(left, "rope_theta")
    if left.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise UserError(
            f"config.json: partial_rotary_factor={given['partial_rotary_factor']!r} is not implemented; supported: 1"
        )
    if kind == "default":
        # transformers ignores lengths and factors of an unscaled rope; some published files carry them.
        for name in ("original_max_position_embeddings",):
            left.pop(name, None)
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, LinearScaling(_number(left, "factor")))
    elif kind == "llama3":
        rope = Rope(
            theta,
            Llama3Scaling(
                factor=_number(left, "factor"),
                low_freq_factor=_number(left, "low_freq_factor"),
                high_freq_factor=_number(left, "high_freq_factor"),
                original_length=_original_length(left, max_length),
            ),
        )
    elif kind == "yarn":
        rope = Rope(theta, _yarn(left, max_length))
    else:
        raise UserError(f"config.json: rope_type={kind!r} is not implemented; supported: default, linear, llama3, yarn")
    if left:
        raise UserError(f"config.json: {', '.join(sorted(left))} of rope type {kind!r} is not implemented")
    return rope


def _yarn(left: dict[str, Any], max_length: int) -> YarnScaling:
    """YaRN as transformers reads it (modeling_rope_utils.py, _compute_yarn_parameters)."""
    original = _original_length(left, max_length)
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


def _original_length(left: dict[str, Any], max_length: int) -> int:
    length = left.pop("original_max_position_embeddings", None)
    return int(max_length if length is None else length)


def _number(left: dict[str, Any], name: str) -> float:
    value = left.pop(name, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"config.json: {name}={value!r} of the rotary embedding must be a positive number")
    return float(value)
