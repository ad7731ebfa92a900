"""What a directory in HF format holds: its config, the language model's tensors under one naming, and the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cft_jax.checkpoints import hf_names
from cft_jax.checkpoints.mxfp4 import Mxfp4Tensor, Rows
from cft_jax.checkpoints.tensor_files import StoredTensor, read_record, read_tensors
from cft_jax.common.errors import UserError
from cft_jax.models.config import ModelConfig
from cft_jax.models.families import config_from_hf, is_multimodal

# Wrapped language models: published files, then those of transformers 5's own naming.
_WRAPPED = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096
_REST = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class HfCheckpoint:
    """A checkpoint in HF format.

    Attributes:
      raw: the record in config.json.
      config: of the language model.
      tensors: the language model's tensors, by the names of `hf_names`.
      owners: name in `tensors` by name in the files; blocks and scales of an MXFP4 tensor have one owner, and so have
        the embedding and a head that repeats it. What is no part of the language model is left out.
      stored: every tensor of the files, by its name there.
    """

    directory: Path
    raw: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, Rows]
    owners: dict[str, str]
    stored: dict[str, StoredTensor]


def read_checkpoint(directory: Path) -> HfCheckpoint:
    """Reads config.json and the headers of the weight files.

    Raises:
      UserError: a file is missing, damaged or half-written, or the tensors are not those that config.json means.
    """
    raw = read_config(directory)
    config = config_from_hf(raw)
    stored = read_tensors(directory)
    owners = _language_model(raw, stored)
    tensors: dict[str, Rows] = {own: stored[name] for name, own in owners.items()}
    if _quantization(raw) == "mxfp4":
        _dequantize(tensors, owners)
    if config.tie_head and {_HEAD, _EMBEDDING} <= tensors.keys():
        _check_repeated(directory, tensors.pop(_HEAD), tensors[_EMBEDDING])
        owners |= {name: _EMBEDDING for name, own in owners.items() if own == _HEAD}
    return HfCheckpoint(directory, raw, config, tensors, owners, stored)


def _check_repeated(directory: Path, head: Rows, embedding: Rows) -> None:
    """Refuses a tied head that is stored with other numbers: transformers 4 reads the embedding there, 5 the head."""
    same = head.shape == embedding.shape
    for start in range(0, head.shape[0] if same else 0, _COMPARED_ROWS):
        stop = min(start + _COMPARED_ROWS, head.shape[0])
        one, other = (part.read(start, stop).astype(np.float32) for part in (head, embedding))
        same &= np.array_equal(one, other)
    if not same:
        raise UserError(
            f"{directory}: config.json ties the head to the embedding, and {_HEAD} holds other numbers, which "
            "transformers 4 ignores and 5 computes with; set tie_word_embeddings to false there to keep them, or "
            "remove the tensor"
        )


def read_config(directory: Path) -> dict[str, Any]:
    """The record in a checkpoint's config.json.

    Raises:
      UserError: the file is missing or damaged.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; give a checkpoint in HF format")
    return read_record(directory / "config.json")


def _language_model(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name in the language model by name in the file; in a multimodal checkpoint the rest is left out."""
    if not is_multimodal(raw):
        return {name: name for name in stored}
    owners: dict[str, str] = {}
    for name in stored:
        prefix = next(filter(name.startswith, _WRAPPED), "")
        if prefix or not name.startswith(_REST):
            owners[name] = _WRAPPED.get(prefix, "") + name.removeprefix(prefix)
    return owners


def _quantization(raw: Mapping[str, Any]) -> str | None:
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method not in (None, "mxfp4"):
        raise UserError(
            f"config.json: quantization_config has quant_method={method!r}, which is not implemented; supported: "
            "mxfp4; use the checkpoint that was not quantised"
        )
    return method


def _dequantize(tensors: dict[str, Rows], owners: dict[str, str]) -> None:
    """Replaces each pair of blocks and scales by the tensor they stand for."""
    for name in [name for name in tensors if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(f"{base}_scales", None)
        assert isinstance(blocks, StoredTensor) and isinstance(scales, StoredTensor | None)
        if scales is None:
            raise UserError(f"tensor {blocks.name} has no {base}_scales beside it; get the checkpoint again")
        if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
            raise UserError(
                f"{blocks.file}: {blocks.name} of shape {list(blocks.shape)} and {scales.name} of shape "
                f"{list(scales.shape)} are no MXFP4 blocks of 16 bytes with one scale each"
            )
        for part in (blocks, scales):
            if part.dtype != np.uint8:
                raise UserError(f"{part.file}: {part.name} has dtype {part.dtype}; MXFP4 blocks and scales are uint8")
        tensors[base] = Mxfp4Tensor(blocks, scales)
        owners |= {blocks.name: base, scales.name: base}


def mismatch(tensors: Mapping[str, Rows], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What keeps tensors from being those of a model, floating-point and of these shapes; empty where nothing does."""
    problems = [f"missing {name}" for name in sorted(shapes.keys() - tensors.keys())]
    problems += [f"unknown {name}" for name in sorted(tensors.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor, shape = tensors[name], shapes[name]
        if tensor.shape != shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the model needs {list(shape)}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} has dtype {tensor.dtype}, which is not floating-point")
    return "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")


def match_shapes(checkpoint: HfCheckpoint, shapes: Mapping[hf_names.Path, tuple[int, ...]]) -> None:
    """Checks that the files hold the model's tensors, whose shapes with us are given, and nothing else.

    Raises:
      UserError: with the names of what is missing, unknown, mis-shaped or of a dtype that is not floating-point.
    """
    names = hf_names.tensor_names(checkpoint.config)
    if {name.path for name in names} != set(shapes):
        raise AssertionError("the name table and the model's weights differ")
    needed = {name.hf: name.layout.file_shape(shapes[name.path][int(name.layer is not None) :]) for name in names}
    if wrong := mismatch(checkpoint.tensors, needed):
        raise UserError(
            f"{checkpoint.directory}: the tensors are not those that config.json means: {wrong}; get the checkpoint "
            "again"
        )
