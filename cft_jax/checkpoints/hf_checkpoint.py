"""What a directory in HF format holds: its config, the language model's tensors under one naming, and the rest."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cft_jax.checkpoints import hf_names
from cft_jax.checkpoints.mxfp4 import Mxfp4Tensor
from cft_jax.checkpoints.tensor_files import Rows, StoredTensor, read_tensors
from cft_jax.common.errors import UserError
from cft_jax.models.config import ModelConfig
from cft_jax.models.families import config_from_hf, is_multimodal

# Wrapped language models: published files, then those of transformers 5's own naming.
_WRAPPED = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_REST = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class HfCheckpoint:
    """A checkpoint in HF format.

    Attributes:
      directory: where it lies.
      config_json: text of config.json.
      raw: the record in it.
      config: of the language model.
      tensors: the language model's tensors, by the names of `hf_names`.
      file_names: of those tensors in the files; two names for an MXFP4 tensor.
      stored: every tensor of the files, by its name there.
    """

    directory: Path
    config_json: str
    raw: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, Rows]
    file_names: dict[str, tuple[str, ...]]
    stored: dict[str, StoredTensor]


def read_checkpoint(directory: Path) -> HfCheckpoint:
    """Reads config.json and the headers of the weight files.

    Raises:
      UserError: a file is missing, damaged or half-written, or the tensors are not those that config.json means.
    """
    text, raw = read_config(directory)
    config = config_from_hf(raw)
    stored = read_tensors(directory)
    named = _language_model(raw, stored)
    tensors, file_names = _dequantized(raw, named, stored)
    if config.tie_head:
        # Some files repeat the tied matrix; it stays in them as it is.
        tensors.pop("lm_head.weight", None)
    return HfCheckpoint(directory, text, raw, config, tensors, file_names, stored)


def read_config(directory: Path) -> tuple[str, dict[str, Any]]:
    """The text of a checkpoint's config.json, and the record in it.

    Raises:
      UserError: the file is missing or damaged.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} has no config.json; give a checkpoint in HF format")
    try:
        text = file.read_text(encoding="utf-8")
        raw = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged or half-written; copy it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds no record; copy it again")
    return text, raw


def _language_model(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name in the file by name in the language model; in a multimodal checkpoint the rest is left out."""
    if not is_multimodal(raw):
        return {name: name for name in stored}
    named: dict[str, str] = {}
    for name in stored:
        for prefix, own in _WRAPPED:
            if name.startswith(prefix):
                named[own + name.removeprefix(prefix)] = name
                break
        else:
            if not name.startswith(_REST):
                named[name] = name
    return named


def _dequantized(
    raw: Mapping[str, Any], named: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, Rows], dict[str, tuple[str, ...]]]:
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method not in (None, "mxfp4"):
        raise UserError(
            f"config.json: quantization_config has quant_method={method!r}, which is not implemented; supported: "
            "mxfp4; use the checkpoint that was not quantised"
        )
    tensors: dict[str, Rows] = {own: stored[name] for own, name in named.items()}
    file_names: dict[str, tuple[str, ...]] = {own: (name,) for own, name in named.items()}
    if method is None:
        return tensors, file_names
    for own in [own for own in tensors if own.endswith("_blocks")]:
        base = own.removesuffix("_blocks")
        scales = f"{base}_scales"
        if scales not in named:
            raise UserError(f"tensor {named[own]} has no {scales} beside it; get the checkpoint again")
        packed = Mxfp4Tensor(stored[named[own]], stored[named[scales]])
        _check_packed(packed)
        del tensors[own], tensors[scales]
        tensors[base] = packed
        file_names[base] = file_names.pop(own) + file_names.pop(scales)
    return tensors, file_names


def _check_packed(packed: Mxfp4Tensor) -> None:
    blocks, scales = packed.blocks, packed.scales
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
        raise UserError(
            f"{blocks.file}: {blocks.name} of shape {list(blocks.shape)} and {scales.name} of shape "
            f"{list(scales.shape)} are no MXFP4 blocks of 16 bytes with one scale each"
        )
    for part in (blocks, scales):
        if part.dtype != np.uint8:
            raise UserError(f"{part.file}: {part.name} has dtype {part.dtype}; MXFP4 blocks and scales are uint8")


def match_shapes(checkpoint: HfCheckpoint, shapes: Mapping[hf_names.Path, tuple[int, ...]]) -> None:
    """Checks that the files hold the model's tensors, all of them and nothing else.

    Args:
      checkpoint: as read.
      shapes: of our base weights, by path.

    Raises:
      UserError: with the names of what is missing, unknown, mis-shaped or of a dtype that is not floating-point.
    """
    names = {name.hf: name for name in hf_names.tensor_names(checkpoint.config)}
    if {name.path for name in names.values()} != set(shapes):
        raise AssertionError("the name table and the model's weights differ")
    found = checkpoint.tensors
    problems = [f"missing {name}" for name in sorted(names.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - names.keys())]
    for hf in sorted(names.keys() & found.keys()):
        name, tensor = names[hf], found[hf]
        shape = shapes[name.path]
        expected = name.layout.file_shape(shape if name.layer is None else shape[1:])
        if tensor.shape != expected:
            problems.append(f"{hf} has shape {list(tensor.shape)}, config.json means {list(expected)}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{hf} has dtype {tensor.dtype}, which is not floating-point")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{checkpoint.directory}: the tensors are not those that config.json means: {'; '.join(problems[:5])}"
            f"{more}; get the checkpoint again"
        )
