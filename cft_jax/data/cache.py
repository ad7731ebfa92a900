"""Arrays on disk, found by what shaped them, verified before use, mapped into memory instead of read.

An entry is one file: the length of a header (8 bytes, little-endian), the header (JSON: the key, and every array's
type, offset, length and SHA-256), then the arrays as raw little-endian numbers. It is written under another name and
moved to its own when whole: a killed process leaves nothing that counts, and of processes that build the same at once
the last one's file stays.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from cft_jax.common.errors import UserError

Arrays = dict[str, np.ndarray]

_FORMAT = 2
_BUILDING = ".building-"
# What killed processes left behind is removed after this long; no build takes as long.
_ABANDONED_SECONDS = 24 * 3600
_BLOCK = 1 << 22
# Arrays, and the first of them, begin at multiples of so many bytes.
_ALIGNMENT = 64


def key_of(content: Mapping[str, Any]) -> str:
    """A name for everything that shapes an entry: JSON values by name."""
    text = json.dumps({"format": _FORMAT, **content}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def load(root: Path, key: str) -> Arrays | None:
    """The arrays of an entry, mapped read-only; None where there is no such entry or it is damaged, which is logged."""
    path = _path(root, key)
    try:
        return _verified(path, key)
    except FileNotFoundError:
        return None
    # How damage shows: the file cut short, a header that cannot be read or lacks something.
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning("the data cache %s is damaged (%s) and is built anew", path, error)
    return None


def store(root: Path, key: str, pieces: Iterable[Mapping[str, np.ndarray]]) -> Arrays:
    """Writes an entry, in place of a damaged one too, and returns its arrays as `load` does.

    Args:
      root: directory of the cache; made where it is missing.
      key: name of the entry.
      pieces: consecutive parts of the arrays, each array with the same type in all of them; only one is in memory.

    Raises:
      UserError: the directory cannot be written or the disk is full.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        _write(root, key, pieces)
        arrays = load(root, key)
        if arrays is None:
            raise OSError(f"what was written to {_path(root, key)} does not read back")
        return arrays
    except OSError as error:
        raise UserError(
            f"cannot write the data cache in {str(root)!r}: {error.strerror or error}; "
            "free some space or set config.data.cache_dir to a writable directory"
        ) from error


def _path(root: Path, key: str) -> Path:
    return root / f"{key}.arrays"


def _write(root: Path, key: str, pieces: Iterable[Mapping[str, np.ndarray]]) -> None:
    entries: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        # Each array grows in a nameless file of its own, so that nothing has to fit into memory.
        files: dict[str, Any] = {}
        digests: dict[str, Any] = {}
        for piece in pieces:
            for name, array in piece.items():
                if name not in files:
                    files[name] = stack.enter_context(tempfile.TemporaryFile(dir=root))
                    digests[name] = hashlib.sha256()
                    entries[name] = {"dtype": array.dtype.newbyteorder("<").str}
                if array.ndim != 1 or array.dtype != np.dtype(entries[name]["dtype"]):
                    raise ValueError(f"a piece of {name} is {array.ndim}-D {array.dtype}, not {entries[name]['dtype']}")
                raw = np.ascontiguousarray(array).data
                files[name].write(raw)
                digests[name].update(raw)
        offset = 0
        for name, entry in entries.items():
            size = files[name].tell()
            entry |= {"offset": offset, "bytes": size, "sha256": digests[name].hexdigest()}
            offset += size + -size % _ALIGNMENT
        header = json.dumps({"key": key, "arrays": entries}).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        whole = stack.enter_context(tempfile.NamedTemporaryFile(dir=root, prefix=_BUILDING, delete=False))
        stack.callback(Path(whole.name).unlink, missing_ok=True)
        whole.write(len(header).to_bytes(8, "little") + header)
        for file in files.values():
            file.seek(0)
            shutil.copyfileobj(file, whole, _BLOCK)
            whole.write(bytes(-whole.tell() % _ALIGNMENT))
        # Not synced to disk: whatever a crash leaves, the digests tell on loading.
        whole.close()
        os.replace(whole.name, _path(root, key))


def _verified(path: Path, key: str) -> Arrays:
    with path.open("rb") as file:
        size = path.stat().st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError(f"it has {size} bytes, fewer than its header")
        header = json.loads(file.read(start - 8))
    if header["key"] != key:
        raise ValueError(f"its header belongs to {header['key']}")
    # As a plain array: the memmap class makes small slices several times slower.
    raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))[start:]

    def verified(item: tuple[str, Mapping[str, Any]]) -> tuple[str, np.ndarray]:
        name, entry = item
        array = raw[entry["offset"] : entry["offset"] + entry["bytes"]]
        if array.size != entry["bytes"]:
            raise ValueError(f"{name} has {array.size} bytes, not {entry['bytes']}")
        if _sha256(path, start + entry["offset"], array.size) != entry["sha256"]:
            raise ValueError(f"{name} differs from its SHA-256")
        return name, array.view(entry["dtype"])

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(verified, header["arrays"].items()))


def _sha256(path: Path, offset: int, size: int) -> str:
    """Of a part of a file, read in blocks: what is mapped and read stays in the process's memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while size and (block := file.read(min(size, _BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _remove_abandoned(root: Path) -> None:
    for path in root.glob(f"{_BUILDING}*"):
        # Another process may be removing it too.
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
