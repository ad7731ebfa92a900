"""Writing a model for the Hugging Face world: merged weights, or a PEFT adapter."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from cft_jax.checkpoints import hf_names, hub, peft_export
from cft_jax.checkpoints.directories import check_free, new_directory
from cft_jax.checkpoints.hf_checkpoint import GENERATION, HfCheckpoint, named_stop_ids, read_checkpoint
from cft_jax.checkpoints.lora_weights import HostWeights, adapter_tensors, changes_nothing
from cft_jax.checkpoints.mxfp4 import Mxfp4Tensor
from cft_jax.checkpoints.tensor_files import (
    INDEX,
    Entry,
    StoredTensor,
    raw_bytes,
    read_record,
    weight_files,
    write_tensors,
)
from cft_jax.common.errors import UserError
from cft_jax.common.progress import Progress
from cft_jax.models.rope_spelling import with_both_spellings
from cft_jax.models.transformer import Transformer

FORMATS = ("merged", "adapter")
_COPY_BYTES = 2**24
# Not copied from the base: they are written anew, or describe other weights.
_OWN_FILES = frozenset({"config.json", INDEX, "adapter_config.json"})
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")
# The base's, whatever the tokenizer.
_SETTINGS = (GENERATION, "preprocessor_config.json", "processor_config.json")


def save_pretrained(
    model: Transformer,
    directory: str | Path,
    *,
    format: str,
    tokenizer: str | Path | None = None,
    card: str | None = None,
) -> None:
    """Writes a directory in HF format, complete or not at all; every process calls it, the first one writes.

    Args:
      model: loaded by `from_pretrained`, whose files it completes.
      directory: absent or empty.
      format: "merged" (all weights, in the files' dtypes and shards) or "adapter" (PEFT).
      tokenizer: directory or hub id of the tokenizer; by default the base checkpoint's.
      card: text of README.md.

    Raises:
      UserError: the directory is taken, the base checkpoint is gone, or the adapter changes nothing.
    """
    if format not in FORMATS:
        raise UserError(f"export format {format!r} must be one of {', '.join(FORMATS)}")
    if model.source is None:
        raise UserError("the model was not loaded from a checkpoint; there is nothing to complete its files from")
    directory, origin = Path(directory), Path(model.source.directory)
    check_free(directory)
    if model.lora_spec is None and format == "adapter":
        raise UserError("the model has no adapter; export it with format merged")
    if model.lora_spec is not None and changes_nothing(model):
        raise UserError("the adapter changes nothing (all its B are zero); train it before exporting")
    write = _Merged(model, read_checkpoint(origin)).write if format == "merged" else peft_export.Exporter(model).write
    if jax.process_index() != 0:
        write(None)
        return
    with new_directory(directory) as place:
        write(place)
        _copy(origin, _COMPANIONS if tokenizer is None else _SETTINGS, place)
        if tokenizer is not None:
            own, _ = hub.resolve(str(tokenizer), revision="main", local_files_only=False)
            _copy(own, _COMPANIONS, place)
        _name_stop_ids(place, model.source.stop_ids)
        if card is not None:
            (place / "README.md").write_text(card, encoding="utf-8")


def _copy(origin: Path, patterns: tuple[str, ...], place: Path) -> None:
    """Tokenizer, chat template, generation settings, processor."""
    for pattern in patterns:
        for file in sorted(origin.glob(pattern)):
            if file.name not in _OWN_FILES and file.is_file():
                shutil.copyfile(file, place / file.name)


def _name_stop_ids(place: Path, stop_ids: Sequence[int]) -> None:
    """Adds the terminator of training to what generation_config.json names, which is written where there is none."""
    named, file = named_stop_ids(place), place / GENERATION
    if set(stop_ids) - set(named):
        record = read_record(file) if file.is_file() else {}
        _write_json(file, record | {"eos_token_id": list(dict.fromkeys([*named, *stop_ids]))})


class _Merged:
    """The files of a checkpoint with the model's weights in place of the old ones.

    A tensor whose weight is what the file gave when it was loaded is copied byte for byte; one with an adapter becomes
    W + scale*BA in float32, rounded once to the file's dtype; one that was trained is rounded to it.
    """

    def __init__(self, model: Transformer, checkpoint: HfCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.weights = HostWeights(model)
        self.changed = False
        self.names = {name.hf: name for name in hf_names.tensor_names(model.config)}
        targets = [] if model.lora_spec is None else adapter_tensors(model.config, model.lora_spec)
        self.adapters = {target.name.hf: target for target in targets}
        if self.names.keys() - checkpoint.tensors.keys():
            raise UserError(f"{checkpoint.directory} is no longer the checkpoint that the model was loaded from")

    def write(self, place: Path | None) -> None:
        """Writes weights and config; without a place, only takes part in gathering the weights."""
        files: dict[str, list[Entry]] = {file.name: [] for file in weight_files(self.checkpoint.directory)}
        for tensor in self.checkpoint.stored.values():
            files[tensor.file.name] += self._entries(tensor)
        sizes = {entry.name: (name, entry.nbytes) for name, entries in files.items() for entry in entries}
        total = sum(size for _, size in sizes.values())
        with Progress("export", total=max(1, total >> 20), unit="MiB") as progress:
            for name, entries in files.items():
                counted = [replace(entry, pieces=_counted(entry.pieces, progress)) for entry in entries]
                if place is None:
                    for entry in counted:
                        for _ in entry.pieces:
                            pass
                else:
                    with (place / name).open("wb") as out:
                        write_tensors(out, counted)
        if self.adapters and not self.changed:
            raise UserError(
                "merging changes nothing: the adapter's updates are lost in rounding to the checkpoint's dtype; train "
                "longer, or export with format adapter"
            )
        if place is not None:
            self._write_index(place, sizes)
            _write_json(place / "config.json", self._config())

    def _entries(self, tensor: StoredTensor) -> list[Entry]:
        """What stands in the place of a tensor of the files: itself, the model's, or nothing for scales."""
        own = self.checkpoint.owners.get(tensor.name)
        if own is None:
            return [Entry(tensor.name, tensor.dtype, tensor.shape, tensor.pieces(_COPY_BYTES))]
        rows, name = self.checkpoint.tensors[own], tensor.name
        if isinstance(rows, Mxfp4Tensor):
            if tensor is rows.scales:
                return []
            name = name.removesuffix("_blocks")
        return [Entry(name, rows.dtype, rows.shape, self._merged(own))]

    def _merged(self, own: str) -> Iterator[memoryview]:
        """The raw bytes of one tensor; a generator, so that one tensor at a time is in memory."""
        rows = self.checkpoint.tensors[own]
        before = rows.read(0, rows.shape[0])
        now = self.weights.base(self.names[own])
        same = _same_bits(before.astype(now.dtype), now)
        after = before if same else now
        if own in self.adapters:
            update = self.weights.update(self.adapters[own])
            if np.any(update):
                after = after.astype(np.float32) + update
        after = after.astype(rows.dtype, copy=False)
        self.changed |= not _same_bits(after, before)
        yield raw_bytes(after)

    def _config(self) -> dict[str, Any]:
        raw = with_both_spellings(self.checkpoint.raw)
        # MXFP4 tensors come out as the bfloat16 they stand for.
        raw.pop("quantization_config", None)
        return raw

    def _write_index(self, place: Path, sizes: dict[str, tuple[str, int]]) -> None:
        index = self.checkpoint.directory / INDEX
        if not index.is_file():
            return
        record = read_record(index)
        weight_map = {name: sizes[name][0] for name in sorted(sizes)}
        if weight_map == record["weight_map"]:
            shutil.copyfile(index, place / INDEX)
            return
        metadata = {**record.get("metadata", {}), "total_size": sum(size for _, size in sizes.values())}
        _write_json(place / INDEX, {**record, "metadata": metadata, "weight_map": weight_map})


def _counted(pieces: Iterable[bytes | memoryview], progress: Progress) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        yield piece
        progress.advance(len(piece) / 2**20)


def _same_bits(one: Shaped[np.ndarray, "..."], other: Shaped[np.ndarray, "..."]) -> bool:
    """Equality that tells -0.0 from 0.0 and lets NaN equal itself."""
    word = np.dtype(f"u{one.dtype.itemsize}")
    return np.array_equal(np.ascontiguousarray(one).view(word), np.ascontiguousarray(other).view(word))


def _write_json(file: Path, record: Any) -> None:
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
