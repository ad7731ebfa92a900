"""Arrays on disk, found by what shaped them, verified before use, mapped into memory instead of read.

An entry is a directory named by its key. It holds one file of raw little-endian numbers per array and a manifest with
every file's type, length and SHA-256. It is built under another name and renamed when whole, so that a killed process
or two processes at once leave either nothing or a whole entry.
"""

import errno
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
from cft_jax.common.files import write_json

Arrays = dict[str, np.ndarray]

_FORMAT = 1
_MANIFEST = "manifest.json"
_BUILDING = ".building-"
# What killed processes left behind is removed after this long; no build takes as long.
_ABANDONED_SECONDS = 24 * 3600
_BLOCK = 1 << 22


def default_directory() -> Path:
    """The user's cache directory, by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "cft_jax" / "data"


def key_of(content: Mapping[str, Any]) -> str:
    """A name for everything that shapes an entry: JSON values by name."""
    text = json.dumps({"format": _FORMAT, **content}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def load(root: Path, key: str) -> Arrays | None:
    """The arrays of an entry, mapped read-only; None where there is no such entry or it is damaged, which is logged."""
    directory = root / key
    if not directory.is_dir():
        return None
    try:
        return _verified(directory, key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning("the data cache %s is damaged (%s) and is built anew", directory, error)
        return None


def store(root: Path, key: str, pieces: Iterable[Mapping[str, np.ndarray]]) -> Arrays:
    """Writes an entry and returns its arrays as `load` does.

    Args:
      root: directory of the cache; made where it is missing.
      key: name of the entry; a damaged entry of this name is replaced.
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
            _publish(building, root / key, key)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache in {str(root)!r}: {error.strerror or error}; "
            "free some space or set config.data.cache_dir to a writable directory"
        ) from error
    return _verified(root / key, key)


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


def _publish(building: Path, directory: Path, key: str) -> None:
    """Renames a whole entry into its place, unless another process has just put a good one there."""
    while True:
        try:
            building.rename(directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if load(directory.parent, key) is not None:
            return
        damaged = Path(tempfile.mkdtemp(dir=directory.parent, prefix=_BUILDING))
        try:
            directory.rename(damaged / "damaged")
        except FileNotFoundError:
            # Another process was faster.
            pass
        finally:
            shutil.rmtree(damaged, ignore_errors=True)


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
