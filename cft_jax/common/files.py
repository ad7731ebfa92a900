"""Files that are either whole or absent, and the user's cache."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def user_cache(name: str) -> Path:
    """A directory of this package in the user's cache, by the XDG rules; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "cft_jax" / name


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a file so that a reader, or a crash, finds the old content or the new, never a part; makes its directory.

    Raises:
      OSError: the disk is full or the place is not writable; the old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinities are refused, since JSON has none."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
