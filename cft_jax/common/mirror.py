"""Workdirs on object stores (gs://): worked on in a local directory whose files are copied there as they change.

Files grow by lines, are renamed into place and are read by libraries that know nothing but local paths; object stores
offer none of that. Checkpoints alone go straight to the store, by orbax, since every process writes its own part.
"""

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from absl import logging
from etils import epath

from cft_jax.common.stores import copy_file, is_remote, reaching

CHECKPOINTS = "checkpoints"
# What a run that goes on writes anew; copied to the store, not back.
_NOT_FETCHED = (CHECKPOINTS, "export", "profile", "tensorboard")
_PUSH_SECONDS = 30.0
_MIRRORS: list["Mirror"] = []


class Mirror:
    """A local directory and the place on the object store that its files are copied to."""

    def __init__(self, local: Path, origin: epath.Path) -> None:
        """Names the two; copies nothing."""
        self.local, self.origin = local, origin
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def fetch(self, under: Path = Path()) -> None:
        """Copies what the store has into the local directory, checkpoints and results aside.

        Args:
          under: a directory in it, relative; by default all.
        """
        with self._lock:
            self._fetch(under)

    def _fetch(self, relative: Path) -> None:
        there = self.origin / relative.as_posix()
        for entry in there.iterdir() if there.is_dir() else ():
            inner = relative / entry.name
            if inner.as_posix() in _NOT_FETCHED:
                continue
            if entry.is_dir():
                self._fetch(inner)
                continue
            file = self.local / inner
            copy_file(entry, epath.Path(file))
            self._copied[inner] = _version(file)

    def push(self) -> None:
        """Copies new and changed files to the store, and removes there what was removed here since.

        A file appears there at once or not at all. Hidden files, which are being written, are left out.
        """
        with self._lock:
            found = {path.relative_to(self.local) for path in self.local.rglob("*") if path.is_file()}
            for name in sorted(found):
                if any(part.startswith(".") for part in name.parts):
                    continue
                with contextlib.suppress(FileNotFoundError):  # replaced meanwhile; it will be found again
                    version = _version(self.local / name)
                    if self._copied.get(name) != version:
                        copy_file(epath.Path(self.local / name), self.origin / name.as_posix())
                        self._copied[name] = version
            for name in self._copied.keys() - found:
                (self.origin / name.as_posix()).unlink(missing_ok=True)
                del self._copied[name]


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def local_workdir(place: str, *, write: bool, flag: str = "--workdir") -> Iterator[Path]:
    """The directory in which to work on a run: the place itself, or for an address a temporary mirror of it.

    The mirror is filled from the store, copied back every half minute, before each checkpoint and at the end, and
    removed. Hosts without a common disk may each have one.

    Args:
      place: a directory, or an address such as gs://bucket/runs/a.
      write: whether this process copies to the store; process 0 does.
      flag: that named the place, for messages.

    Raises:
      UserError: the store cannot be reached.
    """
    if not is_remote(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="cft_jax.") as scratch:
        origin = epath.Path(place)
        mirror = Mirror(Path(scratch) / origin.name, origin)
        with reaching(place, flag):
            mirror.fetch()
        _MIRRORS.append(mirror)
        try:
            with _pushing(mirror) if write else contextlib.nullcontext():
                logging.info("working in %s, a mirror of %s", mirror.local, place)
                yield mirror.local
        finally:
            _MIRRORS.remove(mirror)
        if write:
            logging.info("everything is in %s", place)


@contextlib.contextmanager
def _pushing(mirror: Mirror) -> Iterator[None]:
    """Pushes now and then from a thread of its own, and at the end, however that comes."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(_PUSH_SECONDS):
            try:
                mirror.push()
            except OSError as error:
                logging.warning("%s cannot be written now (%s); trying again", mirror.origin, error)

    thread = threading.Thread(target=work, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with reaching(str(mirror.origin)):
            mirror.push()


def _mirror_of(path: Path) -> Mirror | None:
    return next((mirror for mirror in _MIRRORS if path.is_relative_to(mirror.local)), None)


def checkpoint_directory(workdir: Path) -> epath.Path:
    """Where the checkpoints of a run lie: in its directory, or in the place that the directory mirrors."""
    mirror = _mirror_of(workdir)
    return epath.Path(workdir if mirror is None else mirror.origin) / CHECKPOINTS


def shown(path: Path) -> str:
    """How to name a path to a reader: in a mirror, by its place on the store."""
    mirror = _mirror_of(path)
    return str(path if mirror is None else mirror.origin / path.relative_to(mirror.local).as_posix())


def publish(path: Path) -> None:
    """Makes what was written so far last where `path` belongs to a mirror; a file on a disk needs nothing."""
    mirror = _mirror_of(path)
    if mirror is not None:
        mirror.push()


def refresh(directory: Path) -> None:
    """Fetches what another process published in `directory`, where that belongs to a mirror."""
    mirror = _mirror_of(directory)
    if mirror is not None:
        mirror.fetch(directory.relative_to(mirror.local))
