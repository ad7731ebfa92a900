"""Arrays on disk, found by what shaped them, verified before use, mapped into memory instead of read.

An entry is a directory named by its key and a random part. It holds one file of raw little-endian numbers per array
and a manifest with every file's type, length and SHA-256. It is built under another name and renamed when whole, and
never changed after that: a killed process leaves nothing that counts, and processes that build the same at once make
an entry each, of which the first stays.
"""

import hashlib
import json
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
from cft_jax.common.files import write_json

Arrays = dict[str, np.ndarray]

_FORMAT = 1
_MANIFEST = "manifest.json"
_BUILDING = ".building-"
# What killed processes left behind is removed after this long; no build takes as long.
_ABANDONED_SECONDS = 24 * 3600
_BLOCK = 1 << 22
# How a damaged entry shows: files missing or cut, a manifest that cannot be read or lacks something.
_DAMAGE = (OSError, ValueError, KeyError, TypeError)


def key_of(content: Mapping[str, Any]) -> str:
    """A name for everything that shapes an entry: JSON values by name."""
    text = json.dumps({"format": _FORMAT, **content}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def load(root: Path, key: str) -> Arrays | None:
    """The arrays of an entry, mapped read-only; None where there is no such entry or it is damaged, which is logged."""
    for directory in _entries(root, key):
        try:
            return _verified(directory, key)
        except _DAMAGE as error:
            logging.warning("the data cache %s is damaged (%s) and is built anew", directory, error)
    return None


def store(root: Path, key: str, pieces: Iterable[Mapping[str, np.ndarray]]) -> Arrays:
    """Writes an entry and returns its arrays as `load` does.

    Args:
      root: directory of the cache; made where it is missing.
      key: name of the entry; damaged entries of this name are removed.
      pieces: consecutive parts of the arrays, all with the same names and types.

    Raises:
      UserError: the place cannot be written or the disk is full.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        building = Path(tempfile.mkdtemp(dir=root, prefix=_BUILDING))
        try:
            _write(building, key, pieces)
            entry = root / f"{key}-{building.name.removeprefix(_BUILDING)}"
            building.rename(entry)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return _settled(root, key, entry)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache in {str(root)!r}: {error.strerror or error}; "
            "free some space or set config.data.cache_dir to a writable directory"
        ) from error


def _entries(root: Path, key: str) -> list[Path]:
    """The directories of a key, the first published first."""
    found = []
    for directory in root.glob(f"{key}-*"):
        try:
            # Renaming sets this time.
            found.append((directory.stat().st_ctime_ns, directory))
        except FileNotFoundError:
            # Another process has just removed it.
            continue
    return [directory for _, directory in sorted(found)]


def _settled(root: Path, key: str, own: Path) -> Arrays:
    """The arrays of the first good entry, after removing damaged ones and, if another process was first, our own."""
    kept: Arrays | None = None
    for directory in _entries(root, key):
        if kept is not None and directory != own:
            continue
        try:
            arrays = _verified(directory, key)
        except _DAMAGE:
            shutil.rmtree(directory, ignore_errors=True)
            continue
        if kept is not None:
            shutil.rmtree(own, ignore_errors=True)
        else:
            kept = arrays
    if kept is None:
        raise OSError(f"what was written to {own} does not read back")
    return kept


def _write(directory: Path, key: str, pieces: Iterable[Mapping[str, np.ndarray]]) -> None:
    files: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    try:
        for piece in pieces:
            for name, array in piece.items():
                if name not in files:
                    files[name] = (directory / f"{name}.bin").open("wb")
                    digests[name] = hashlib.sha256()
                    entries[name] = {"dtype": array.dtype.newbyteorder("<").str, "length": 0}
                if array.ndim != 1 or array.dtype != np.dtype(entries[name]["dtype"]):
                    raise ValueError(f"a piece of {name} is {array.ndim}-D {array.dtype}, not {entries[name]['dtype']}")
                raw = np.ascontiguousarray(array).data
                files[name].write(raw)
                digests[name].update(raw)
                entries[name]["length"] += array.size
    finally:
        for file in files.values():
            file.close()
    # Not synced to disk: whatever a crash leaves, the digests tell on loading.
    for name, entry in entries.items():
        entry["sha256"] = digests[name].hexdigest()
    write_json(directory / _MANIFEST, {"key": key, "arrays": entries})


def _verified(directory: Path, key: str) -> Arrays:
    manifest = json.loads((directory / _MANIFEST).read_bytes())
    if manifest["key"] != key:
        raise ValueError(f"its manifest belongs to {manifest['key']}")
    entries: dict[str, dict[str, Any]] = manifest["arrays"]
    with ThreadPoolExecutor() as pool:
        arrays = pool.map(lambda item: _verified_array(directory / f"{item[0]}.bin", item[1]), entries.items())
        return dict(zip(entries, arrays, strict=True))


def _verified_array(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, length = np.dtype(entry["dtype"]), int(entry["length"])
    if path.stat().st_size != dtype.itemsize * length:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {dtype.itemsize * length}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} differs from its SHA-256")
    if length == 0:
        return np.empty(0, dtype=dtype)
    # As a plain array: the memmap class makes small slices several times slower.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _remove_abandoned(root: Path) -> None:
    for path in root.glob(f"{_BUILDING}*"):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        except FileNotFoundError:
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)
