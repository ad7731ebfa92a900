"""Writing a model for the Hugging Face world: merged weights, or a PEFT adapter."""

import collections
import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.typing import DTypeLike
from jaxtyping import Shaped

from cft_jax.checkpoints import hf_names
from cft_jax.checkpoints.directories import check_free, new_directory
from cft_jax.checkpoints.generation_config import GENERATION, write_generation_config
from cft_jax.checkpoints.hf_checkpoint import read_checkpoint
from cft_jax.checkpoints.lora_weights import HostWeights, adapter_tensors
from cft_jax.checkpoints.mxfp4 import Mxfp4Tensor
from cft_jax.checkpoints.peft_files import write_adapter
from cft_jax.checkpoints.tensor_files import INDEX, StoredTensor, TensorSpec, read_record, write_record, write_tensors
from cft_jax.common import hub
from cft_jax.common.errors import UserError
from cft_jax.common.progress import Progress
from cft_jax.models.rope_spelling import with_both_spellings
from cft_jax.models.transformer import Transformer

# Numbers of a tensor that are in float64 at a time.
_SUMMED = 2**22
# Shares of the update that survive rounding: not worth a word in the card (float32 rounds, too), warned of, refused.
_ALL_BUT_ROUNDING, _WARNED, _REFUSED = 0.9995, 0.9, 0.5
# Not copied from the base: they are written anew, or describe other weights.
_OWN_FILES = frozenset({"config.json", INDEX, "adapter_config.json", GENERATION})
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")
# The base's, whatever the tokenizer.
_SETTINGS = ("preprocessor_config.json", "processor_config.json")


def save_pretrained(
    model: Transformer,
    directory: str | Path,
    *,
    format: str,
    dtype: DTypeLike | None = None,
    tokenizer: str | Path | None = None,
    card: str | None = None,
) -> None:
    """Writes a directory in HF format, complete or not at all; every process calls it, the first one writes.

    Merging rounds to the dtype of the files. How much of the training's update survives that (see `_Rounding`) is
    logged and added to the card; where it is less than half, nothing is written. `generation_config.json` makes others
    sample as the model was trained; settings of the base that would not are named in the card instead.

    Args:
      model: loaded by `from_pretrained`, whose files it completes.
      directory: absent or empty.
      format: "merged" (all weights, in the files' shards) or "adapter" (PEFT).
      dtype: of the merged weights; by default each tensor keeps the file's.
      tokenizer: directory or hub id of the tokenizer; by default the base checkpoint's.
      card: text of README.md.

    Raises:
      UserError: the directory is taken, the base checkpoint is gone, the adapter changes nothing, or rounding loses
        the update.
    """
    if format not in ("merged", "adapter"):
        raise UserError(f"export format {format!r} must be one of merged, adapter")
    if model.source is None:
        raise UserError("the model was not loaded from a checkpoint; there is nothing to complete its files from")
    directory, origin = Path(directory), Path(model.source.directory)
    check_free(directory)
    if model.lora_spec is None and format == "adapter":
        raise UserError("the model has no adapter; export it with format merged")
    rounding = _Rounding()
    merged = format == "merged"
    write = _Merged(model, origin, dtype, rounding).write if merged else functools.partial(write_adapter, model)
    if jax.process_index() != 0:
        write(None)
        return
    with new_directory(directory) as out:
        write(out)
        _copy(origin, _COMPANIONS if tokenizer is None else _SETTINGS, out)
        if tokenizer is not None:
            own, _ = hub.resolve(str(tokenizer), revision="main", local_files_only=False)
            _copy(own, _COMPANIONS, out)
        left_out = write_generation_config(origin, out, model.source.stop_ids)
        if card is not None:
            (out / "README.md").write_text(card + rounding.section() + _sampling_section(left_out), encoding="utf-8")


def _copy(origin: Path, patterns: tuple[str, ...], out: Path) -> None:
    """Tokenizer, chat template, processor."""
    for pattern in patterns:
        for file in sorted(origin.glob(pattern)):
            if file.name not in _OWN_FILES and file.is_file():
                shutil.copyfile(file, out / file.name)


def _sampling_section(left_out: Mapping[str, Any]) -> str:
    """A section of the model card about the base's sampling settings; empty where it has none."""
    if not left_out:
        return ""
    settings = ", ".join(f"`{name}` {value}" for name, value in left_out.items())
    return (
        f"\n## Sampling settings of the base\n\nIts `{GENERATION}` had {settings}. They are left out here, because "
        "they would change the distribution; for other prompts they may still be the better choice.\n"
    )


class _Rounding:
    """How much of an update survives rounding: <merged - base, update> / <update, update> over all changed tensors.

    1 where nothing is lost, 0 where every weight is rounded back to what it was. bfloat16 has steps of 1/256 to 1/128
    of a weight, and an update of less than half a step is lost.
    """

    def __init__(self) -> None:
        self.kept = self.whole = 0.0
        self.dtypes: set[str] = set()

    def add(
        self, before: Shaped[np.ndarray, "..."], exact: Iterable[Shaped[np.ndarray, "..."]], after: np.ndarray
    ) -> None:
        """Counts one tensor, in float64 and a few rows at a time; `exact` adds up to what it should have become."""
        self.dtypes.add(after.dtype.name)
        step = max(1, _SUMMED // math.prod(before.shape[1:]))
        for start in range(0, before.shape[0], step):
            base, merged, *parts = (x[start : start + step].astype(np.float64) for x in (before, after, *exact))
            update = sum(parts) - base
            self.kept += float(np.vdot(merged - base, update))
            self.whole += float(np.vdot(update, update))

    @property
    def share(self) -> float:
        """What is left of the update; 1 where there is none."""
        return self.kept / self.whole if self.whole else 1.0

    def __str__(self) -> str:
        return f"rounding to {', '.join(sorted(self.dtypes))} keeps {self.share:.1%} of the training's update"

    def check(self, *, adapters: bool) -> None:
        """Logs the share.

        Raises:
          UserError: less than half is left, or the adapters change nothing.
        """
        if adapters and not self.whole:
            raise UserError("the adapter changes nothing (every A or every B is zero); train it before exporting")
        if self.share < _REFUSED:
            other = "format adapter or " if adapters else ""
            raise UserError(f"{self}; export with {other}dtype float32 (cft_jax.export --dtype=float32)")
        if self.whole:
            logging.log(logging.WARNING if self.share < _WARNED else logging.INFO, "%s", self)

    def section(self) -> str:
        """A section of the model card; empty where there is nothing to say."""
        return f"\n## Rounding\n\nOf these weights, {self}.\n" if self.share < _ALL_BUT_ROUNDING else ""


@dataclass(frozen=True)
class _MergedTensor(TensorSpec):
    read: Callable[[], np.ndarray]


class _Merged:
    """The files of a checkpoint with the model's weights instead of the old ones.

    A tensor whose weight is what the file gave when it was loaded is copied byte for byte; one with an adapter becomes
    W + scale*BA in float32, rounded once to the file's dtype; one that was trained is rounded to it.
    """

    def __init__(self, model: Transformer, origin: Path, dtype: DTypeLike | None, rounding: _Rounding) -> None:
        self.checkpoint, self.rounding = read_checkpoint(origin), rounding
        self.dtype = None if dtype is None else np.dtype(dtype)
        self.weights = HostWeights(model)
        self.names = {name.hf: name for name in hf_names.tensor_names(model.config)}
        spec = model.lora_spec
        targets = [] if spec is None or spec.alpha == 0 else adapter_tensors(model.config, spec)
        self.adapters = {target.name.hf: target for target in targets}
        if self.names.keys() - self.checkpoint.tensors.keys():
            raise UserError(f"{origin} is no longer the checkpoint that the model was loaded from")

    def write(self, out: Path | None) -> None:
        """Writes weights and config; without a directory, only takes part in gathering the weights."""
        files: dict[str, dict[str, StoredTensor | _MergedTensor]] = {}
        for stored in self.checkpoint.stored.values():
            files.setdefault(stored.file.name, {}).update(self._instead(stored))
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        with Progress("export", total=max(1, total >> 20), unit="MiB") as progress:
            for file, tensors in files.items():
                arrays = _read_all(tensors.values(), progress)
                if out is None:
                    collections.deque(arrays, maxlen=0)
                else:
                    write_tensors(out / file, tensors, arrays)
        self.rounding.check(adapters=bool(self.adapters))
        if out is not None:
            self._write_index(out, dict(sorted(weight_map.items())), total)
            raw = with_both_spellings(self.checkpoint.raw)
            # MXFP4 tensors come out as the bfloat16 they stand for.
            raw.pop("quantization_config", None)
            write_record(out / "config.json", raw if self.dtype is None else _with_dtype(raw, self.dtype.name))

    def _instead(self, stored: StoredTensor) -> dict[str, StoredTensor | _MergedTensor]:
        """By name, what stands instead of a tensor of the files: itself, the model's, or nothing for scales."""
        own = self.checkpoint.owners.get(stored.name)
        if own is None:
            return {stored.name: stored}
        rows, name = self.checkpoint.tensors[own], stored.name
        if isinstance(rows, Mxfp4Tensor):
            if stored is rows.scales:
                return {}
            name = name.removesuffix("_blocks")
        dtype = self.dtype or rows.dtype
        return {name: _MergedTensor(dtype, rows.shape, functools.partial(self._merged, own, dtype))}

    def _merged(self, own: str, dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        before = self.checkpoint.tensors[own].read()
        now = self.weights.base(self.names[own])
        trained = before if _same_bits(before.astype(now.dtype), now) else now
        update = self.weights.update(self.adapters[own]) if own in self.adapters else None
        if update is None or not np.any(update):
            after = trained.astype(dtype, copy=False)
        else:
            after = (trained.astype(np.float32) + update).astype(dtype)
        if update is not None or trained is now:
            self.rounding.add(before, [trained] if update is None else [trained, update], after)
        return after

    def _write_index(self, out: Path, weight_map: dict[str, str], total: int) -> None:
        index = self.checkpoint.directory / INDEX
        if not index.is_file():
            return
        record = read_record(index)
        if self.dtype is None and weight_map == record["weight_map"]:
            shutil.copyfile(index, out / INDEX)
            return
        metadata = {**record.get("metadata", {}), "total_size": total}
        write_record(out / INDEX, {**record, "metadata": metadata, "weight_map": weight_map})


def _with_dtype(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """config.json of weights in another dtype, in the spellings of transformers 5 and 4."""
    if "text_config" in raw:
        raw = {**raw, "text_config": _with_dtype(raw["text_config"], name)}
    return {**raw, "dtype": name, "torch_dtype": name}


def _read_all(tensors: Iterable[StoredTensor | _MergedTensor], progress: Progress) -> Iterator[np.ndarray]:
    """One tensor at a time, which is all that is in memory."""
    for tensor in tensors:
        yield tensor.read()
        progress.advance(tensor.nbytes / 2**20)


def _same_bits(one: Shaped[np.ndarray, "..."], other: Shaped[np.ndarray, "..."]) -> bool:
    """Equality that tells -0.0 from 0.0 and lets NaN equal itself."""
    word = np.dtype(f"u{one.dtype.itemsize}")
    return np.array_equal(one.view(word), other.view(word))
