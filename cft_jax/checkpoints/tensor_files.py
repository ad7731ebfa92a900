"""Reading and writing safetensors files piece by piece.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, the header in JSON (dtype,
shape and data offsets by name), the data. The library's own slicing knows no bfloat16 in numpy and maps whole files,
whose touched pages count as resident memory; here rows are read into a buffer of the size asked for.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from cft_jax.common.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@runtime_checkable
class Rows(Protocol):
    """A tensor that is read by rows of its first axis."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start:stop, [stop - start, *shape[1:]]."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        row = math.prod(self.shape[1:])
        with self.file.open("rb") as file:
            file.seek(self.offset + start * row * self.dtype.itemsize)
            data = np.fromfile(file, np.uint8, (stop - start) * row * self.dtype.itemsize)
        return data.view(self.dtype).reshape(stop - start, *self.shape[1:])

    def pieces(self, nbytes: int) -> Iterator[bytes]:
        """The raw bytes, at most `nbytes` at a time."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                piece = file.read(min(left, nbytes))
                if not piece:
                    raise UserError(f"{self.file} ends inside tensor {self.name}; copy the checkpoint again")
                left -= len(piece)
                yield piece


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
      UserError: the file is damaged or cut short, or a tensor has a dtype that is not known.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _damaged(file, "its header is cut short")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise _damaged(file, "its header is no JSON") from error
    header.pop("__metadata__", None)
    tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
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
    if kind not in DTYPES:
        raise UserError(f"{file}: tensor {name} has dtype {kind}, which is not known; known: {', '.join(DTYPES)}")
    tensor = StoredTensor(file, name, DTYPES[kind], shape, base + start)
    if tensor.nbytes != stop - start:
        raise _damaged(file, f"tensor {name} of shape {list(shape)} and dtype {kind} has {stop - start} bytes")
    return tensor


def read_record(file: Path) -> dict[str, Any]:
    """The record in a JSON file of a checkpoint.

    Raises:
      UserError: the file is damaged.
    """
    try:
        record = json.loads(file.read_bytes())
    except ValueError as error:
        raise _damaged(file, "it is no JSON") from error
    if not isinstance(record, dict):
        raise _damaged(file, "it holds no record")
    return record


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as the JSON of HF's files, indented."""
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    names = sorted(set(read_weight_map(index).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} lacks {', '.join(missing)}, named in {INDEX}; copy or download them again")
    return [directory / name for name in names]


def read_weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name, from model.safetensors.index.json.

    Raises:
      UserError: the index is damaged.
    """
    weight_map = read_record(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise _damaged(index, "it has no weight_map")
    files = weight_map.values()
    # A path would let an index read files outside its directory.
    if not all(isinstance(name, str) and Path(name).name == name for name in files):
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
        weight_map = read_weight_map(index)
        wrong = [n for n in {*weight_map, *tensors} if n not in tensors or tensors[n].file.name != weight_map.get(n)]
        if wrong:
            raise _damaged(index, f"it does not match the files, for example for tensor {min(wrong)}")
    return tensors


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: `pieces` are its raw bytes in order."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[bytes | memoryview]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in row-major order, without a copy where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_tensors(file: BinaryIO, entries: Sequence[Entry]) -> None:
    """Writes a safetensors file in one pass, the data in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for entry in entries:
        written = sum(file.write(piece) for piece in entry.pieces)
        if written != entry.nbytes:
            raise AssertionError(f"tensor {entry.name} of shape {entry.shape} got {written} bytes")
