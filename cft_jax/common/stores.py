"""What lies on object stores (gs://): telling addresses from paths, copying files, local copies of checkpoints."""

import contextlib
import fnmatch
import functools
import hashlib
import importlib.util
import logging as stdlib_logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from cft_jax.common.errors import UserError
from cft_jax.common.files import user_cache
from cft_jax.common.progress import Progress

GOOGLE = "https://storage.googleapis.com"
_TIMEOUT_SECONDS = 10
_BLOCK = 2**24


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is the address of an object store."""
    return "://" in str(place)


@contextlib.contextmanager
def reaching(address: str, flag: str = "") -> Iterator[None]:
    """Tells in one line why a store cannot be read or written.

    Args:
      address: on the store.
      flag: the flag or field that named it, for messages.

    Raises:
      UserError: the client's package is absent, or the store does not answer or refuses.
    """
    what = f"{flag}={address}" if flag else address
    for name in ("gcsfs", "fsspec"):
        stdlib_logging.getLogger(name).setLevel(stdlib_logging.WARNING)
    if address.startswith("gs://") and not google_answers():
        raise UserError(f"{what}: {GOOGLE} does not answer; check the network, or name a local directory")
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError(f'{what} needs a package that is absent; pip install -e ".[gcs]"') from None
    except Exception as error:
        raise UserError(
            f"{what} cannot be reached: {type(error).__name__}: {error}; check the address, the network and Google's "
            "credentials (gcloud auth application-default login)"
        ) from error


@functools.cache
def google_answers() -> bool:
    """Whether Google's object store can be reached; its client would try for minutes without a word."""
    if "STORAGE_EMULATOR_HOST" in os.environ or importlib.util.find_spec("gcsfs") is None:
        return True  # somewhere else, or to be told by the client
    try:
        with urllib.request.urlopen(GOOGLE, timeout=_TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def copy_file(source: epath.Path, target: epath.Path, advance: Callable[[int], Any] = lambda _: None) -> None:
    """Copies one file block by block; on a store it appears when it is whole.

    Args:
      source: file on a store or a disk.
      target: the same; its directory is made.
      advance: told the bytes of every block.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(_BLOCK):
            write.write(block)
            advance(len(block))


def fetched(address: str, patterns: Sequence[str]) -> Path:
    """A local copy of the files of a checkpoint on a store, in the user's cache; copied once.

    Args:
      address: of the directory.
      patterns: of the names to copy; subdirectories are left out.

    Raises:
      UserError: the store cannot be reached, or has no such files there.
    """
    origin = epath.Path(address)
    key = hashlib.sha256(str(origin).encode()).hexdigest()[:16]
    place = user_cache("checkpoints") / f"{origin.name}-{key}"
    with reaching(address):
        wanted = {
            entry.name: (entry, entry.stat())
            for entry in (origin.iterdir() if origin.is_dir() else ())
            if any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns) and not entry.is_dir()
        }
    if not wanted:
        raise UserError(f"checkpoint {address}: there is no such directory, or it has none of {', '.join(patterns)}")
    for file in place.glob("*"):
        if file.name not in wanted and any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
            file.unlink()
    missing = [(entry, status) for entry, status in wanted.values() if not _is_copy(place / entry.name, status)]
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    needed = sum(status.length for _, status in missing)
    if needed > free:
        raise UserError(
            f"checkpoint {address} takes {needed / 2**30:.1f} GiB in {place} and {free / 2**30:.1f} GiB are free; free "
            "some space, or set XDG_CACHE_HOME to a larger disk"
        )
    if missing:
        logging.info("copying %s to %s", address, place)
    with Progress(f"copy {origin.name}", total=max(1, needed >> 20), unit="MiB") as progress:
        for entry, _ in missing:
            temporary = place / f".{entry.name}.{os.getpid()}"
            try:
                with reaching(address):
                    copy_file(entry, epath.Path(temporary), lambda count: progress.advance(count / 2**20))
                os.replace(temporary, place / entry.name)
            finally:
                temporary.unlink(missing_ok=True)
    return place


def _is_copy(file: Path, status: Any) -> bool:
    """Whether a local file is as long as the one on the store and was written after it."""
    if not file.exists():
        return False
    own = file.stat()
    return own.st_size == status.length and own.st_mtime >= (status.mtime or time.time())
