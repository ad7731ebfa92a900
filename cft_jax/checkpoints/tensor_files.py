"""Reading and writing safetensors files piece by piece.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, the header in JSON (dtype,
shape and data offsets by name), the data. The library's own slicing knows no bfloat16 in numpy and maps whole files,
whose touched pages count as resident memory; here rows are read into a buffer of the size asked for.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cft_jax.common.errors import UserError

# fmt: off
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
# fmt: on
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and shape of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """Where a tensor lies in a file."""

    name: str
    file: Path
    offset: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of the first axis, [stop - start, *shape[1:]]; by default all, a scalar as one row.

        Raises:
          UserError: the file has become shorter.
        """
        stop = math.prod(self.shape[:1]) if stop is None else stop
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = np.fromfile(self.file, np.uint8, (stop - start) * row, offset=self.offset + start * row)
        if data.size < (stop - start) * row:
            raise UserError(f"{self.file} ends inside tensor {self.name}; copy the checkpoint again")
        return data.view(self.dtype).reshape(stop - start, *self.shape[1:])


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
      UserError: the file is damaged or cut short, or a tensor has a dtype that is not known.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _damaged(file, "its header is cut short")
        header = _record(file, stream.read(length), "its header")
    header.pop("__metadata__", None)
    end = 8 + length
    tensors = [_stored(file, name, entry, end) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    for tensor in tensors:
        if tensor.offset != end:
            raise _damaged(file, f"tensor {tensor.name} does not start where the one before it ends")
        end += tensor.nbytes
    if end != size:
        raise _damaged(file, f"its header describes {end} bytes and it has {size}")
    return {tensor.name: tensor for tensor in tensors}


def _stored(file: Path, name: str, entry: Mapping[str, Any], base: int) -> StoredTensor:
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the header's entry of tensor {name} is incomplete") from error
    if kind not in _DTYPES:
        raise UserError(f"{file}: tensor {name} has dtype {kind}, which is not known; known: {', '.join(_DTYPES)}")
    tensor = StoredTensor(_DTYPES[kind], shape, name, file, base + start)
    if tensor.nbytes != stop - start:
        raise _damaged(file, f"tensor {name} of shape {list(shape)} and dtype {kind} has {stop - start} bytes")
    return tensor


def read_record(file: Path) -> dict[str, Any]:
    """The record in a JSON file of a checkpoint.

    Raises:
      UserError: the file is damaged.
    """
    return _record(file, file.read_bytes(), "it")


def _record(file: Path, text: bytes, what: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _damaged(file, f"{what} is no JSON") from error
    if not isinstance(record, dict):
        raise _damaged(file, f"{what} holds no record")
    return record


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as the JSON of HF's files, indented."""
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file} is damaged or half-written: {why}; copy or download it again")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint in HF format.

    Raises:
      UserError: there are none, the index is damaged, or it names a file that is missing.
    """
    index = directory / INDEX
    if not index.is_file():
        if (directory / WEIGHTS).is_file():
            return [directory / WEIGHTS]
        shards = sorted(directory.glob("model-*-of-*.safetensors"))
        if shards:
            raise UserError(f"{directory} has shards such as {shards[0].name} but no {INDEX}; copy it too")
        if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
            raise UserError(
                f"{directory} has only pickled weights (.bin), which are never loaded; convert them to safetensors"
            )
        raise UserError(f"{directory} has no {WEIGHTS} and no {INDEX}; is it a checkpoint in HF format?")
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} lacks {', '.join(missing)}, named in {INDEX}; copy or download them again")
    return [directory / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name."""
    weight_map = read_record(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise _damaged(index, "it has no weight_map")
    # A path would let an index read files outside its directory.
    if not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
        raise _damaged(index, "its weight_map names files outside the directory")
    return weight_map


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint in HF format, by name.

    Raises:
      UserError: as `weight_files` and `read_header`; or the index and the files name different tensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise UserError(f"tensor {name} is in both {tensors[name].file} and {file}; remove one of them")
            tensors[name] = tensor
    index = directory / INDEX
    if index.is_file():
        wrong = _weight_map(index).items() ^ {name: tensor.file.name for name, tensor in tensors.items()}.items()
        if wrong:
            raise _damaged(index, f"it does not match the files, for example for tensor {min(wrong)[0]}")
    return tensors


def write_tensors(file: Path, tensors: Mapping[str, TensorSpec | np.ndarray], arrays: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file in one pass: dtypes and shapes by name, then the values in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        offsets = [offset, offset := offset + tensor.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), array in zip(tensors.items(), arrays, strict=True):
            written = stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if written != tensor.nbytes:
                raise AssertionError(f"tensor {name} of shape {tensor.shape} got {written} bytes")
