"""Object stores (gs://) in place of local directories: copies of checkpoints, and workdirs that are mirrored there.

Files grow by lines, are renamed into place and are read by libraries that know nothing but local paths; object stores
offer none of that. So a run works in a local directory whose files are copied to the store as they change. Checkpoints
alone go straight to the store, by orbax, since every process writes its own part.
"""

import contextlib
import fnmatch
import functools
import hashlib
import importlib.util
import logging as stdlib_logging
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from cft_jax.common.errors import UserError
from cft_jax.common.files import user_cache, write_atomically
from cft_jax.common.progress import Progress

GOOGLE = "https://storage.googleapis.com"
CHECKPOINTS = "checkpoints"
# What a run that resumes writes anew; copied to the store, not back.
_NOT_FETCHED = (CHECKPOINTS, "export", "profile", "tensorboard")
_PUSH_SECONDS = 30.0
_TIMEOUT_SECONDS = 10
_BLOCK = 2**24


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is the address of an object store."""
    return "://" in str(place)


def check_file(output: str, example: str) -> None:
    """Refuses a place where no file can be written: a directory, for which `example` names a file, or below a file.

    Raises:
      UserError: it is such a place.
    """
    if is_remote(output):
        return
    if Path(output).is_dir():
        raise UserError(f"--output={output} is a directory; name a file in it, as in {output}/{example}")
    above = next(path for path in Path(output).absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"cannot write --output={output}: {above} is a file; name another file")


def write_file(output: str, text: str) -> None:
    """Writes a file, here or on a store; it appears whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    if is_remote(output):
        with reaching(output, "--output"):
            epath.Path(output).write_text(text)
        return
    try:
        write_atomically(Path(output), text)
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error.strerror or error}; name another file") from error


@contextlib.contextmanager
def reaching(address: str, flag: str = "") -> Iterator[None]:
    """Tells in one line why a store cannot be read or written; does nothing for a local place.

    `flag` is the flag or field that named the address, for messages.

    Raises:
      UserError: the client's package is absent, or the store does not answer or refuses.
    """
    if not is_remote(address):
        yield
        return
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
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)


def _copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies one file, here or on a store, where it appears when it is whole; its directory is made."""
    epath.Path(target).parent.mkdir(parents=True, exist_ok=True)
    with epath.Path(source).open("rb") as read, epath.Path(target).open("wb") as write:
        shutil.copyfileobj(read, write, _BLOCK)


def fetched(address: str, patterns: Sequence[str]) -> Path:
    """A local copy of the files of a checkpoint on a store whose names fit, in the user's cache; copied once.

    Raises:
      UserError: the store cannot be reached, or has no such files there; or the disk is too small.
    """
    origin = epath.Path(address)
    place = user_cache("checkpoints") / f"{origin.name}-{hashlib.sha256(str(origin).encode()).hexdigest()[:16]}"

    def is_wanted(entry: Any) -> bool:
        return any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns) and not entry.is_dir()

    with reaching(address):
        there = origin.iterdir() if origin.is_dir() else ()
        wanted = {entry.name: entry.stat() for entry in there if is_wanted(entry)}
    if not wanted:
        raise UserError(f"checkpoint {address}: there is no such directory, or it has none of {', '.join(patterns)}")
    for file in place.glob("*"):
        if file.name not in wanted and is_wanted(file):
            file.unlink()
    sizes = {name: found.length for name, found in wanted.items() if not _is_copy(place / name, found)}
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if sum(sizes.values()) > free:
        raise UserError(
            f"checkpoint {address} takes {sum(sizes.values()) / 2**30:.1f} GiB in {place} and {free / 2**30:.1f} GiB "
            "are free; free some space, or set XDG_CACHE_HOME to a larger disk"
        )
    with Progress(f"copy {address} to {place},", total=len(sizes), unit="file") as progress:
        for name in sizes:
            temporary = place / f".{name}.{os.getpid()}"
            try:
                with reaching(address):
                    _copy(origin / name, temporary)
                os.replace(temporary, place / name)
            finally:
                temporary.unlink(missing_ok=True)
            progress.advance()
    return place


def _is_copy(file: Path, there: Any) -> bool:
    """Whether a local file is as long as the one on the store and was written after it."""
    own = file.stat() if file.exists() else None
    return own is not None and own.st_size == there.length and own.st_mtime >= (there.mtime or time.time())


class Workdir:
    """A directory of results: a local path to work in and, for one on an object store, the place that it mirrors.

    Attributes:
      path: local; what is read and written.
      origin: where the files last: the same path, or an address.
      checkpoints: where those of a run lie.
    """

    def __init__(self, path: Path, origin: epath.Path | None = None, *, write: bool = True) -> None:
        """Names the two, with `write` where this process copies to the store; copies nothing."""
        self.path, self.origin = path, epath.Path(path) if origin is None else origin
        self.checkpoints = self.origin / CHECKPOINTS
        self._is_mirror, self._write = origin is not None, write
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        """The place as the user named it."""
        return str(self.origin)

    def inner(self, name: str) -> "Workdir":
        """A directory in this one as a workdir of its own; what is written there is copied to the same store."""
        return Workdir(self.path / name, self.origin / name if self._is_mirror else None, write=self._write)

    def fetch(self, under: str = "") -> None:
        """Copies what the store has in a directory of it, by default in all, checkpoints and results aside."""
        there = self.origin / under
        for entry in there.iterdir() if self._is_mirror and there.is_dir() else ():
            inner = Path(under) / entry.name
            if inner.as_posix() in _NOT_FETCHED or inner.name == CHECKPOINTS:
                continue
            if entry.is_dir():
                self.fetch(inner.as_posix())
                continue
            with self._lock:
                _copy(entry, self.path / inner)
                self._copied[inner] = _version(self.path / inner)

    def publish(self) -> None:
        """Copies new and changed files to the store, and removes there what was removed here since.

        A file appears there at once or not at all. Hidden files, which are being written, are left out. Does nothing
        for a local directory, or where another process writes.
        """
        if not self._is_mirror or not self._write:
            return
        with self._lock:
            present = {path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file()}
            for name in sorted(present):
                if any(part.startswith(".") for part in name.parts):
                    continue
                with contextlib.suppress(FileNotFoundError):  # replaced meanwhile; the next time it is there
                    version = _version(self.path / name)
                    if self._copied.get(name) != version:
                        _copy(self.path / name, self.origin / name.as_posix())
                        self._copied[name] = version
            for name in self._copied.keys() - present:
                (self.origin / name.as_posix()).unlink(missing_ok=True)
                del self._copied[name]


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def opened(place: str, *, write: bool, flag: str = "--workdir") -> Iterator[Workdir]:
    """A workdir: the place itself, or for an address such as gs://bucket/runs/a a temporary mirror of it.

    The mirror is filled from the store, copied back every half minute, before each checkpoint and at the end, and
    removed. Hosts without a common disk may each have one; `write` tells whether this process copies to the store.

    Raises:
      UserError: the store cannot be reached.
    """
    if not is_remote(place):
        yield Workdir(Path(place))
        return
    with tempfile.TemporaryDirectory(prefix="cft_jax.") as scratch:
        origin = epath.Path(place)
        workdir = Workdir(Path(scratch) / origin.name, origin, write=write)
        with reaching(place, flag):
            workdir.fetch()
        with _publishing(workdir) if write else contextlib.nullcontext():
            logging.info("working in %s, a mirror of %s", workdir.path, place)
            yield workdir
        if write:
            logging.info("everything is in %s", place)


@contextlib.contextmanager
def _publishing(workdir: Workdir) -> Iterator[None]:
    """Publishes now and then from a thread of its own, and at the end, however that comes."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(_PUSH_SECONDS):
            try:
                workdir.publish()
            except OSError as error:
                logging.warning("%s cannot be written now (%s); trying again", workdir, error)

    thread = threading.Thread(target=work, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with reaching(str(workdir)):
            workdir.publish()
