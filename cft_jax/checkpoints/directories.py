"""Writing a directory all at once: it appears complete, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cft_jax.common.errors import UserError


def check_free(directory: Path) -> None:
    """Refuses a directory that is taken.

    Raises:
      UserError: `directory` is a file or a directory with something in it.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not empty; give another one or remove it")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `directory` when the block ends without an error.

    Args:
      directory: absent or empty; its parents are made.

    Raises:
      UserError: `directory` holds something, or the disk does not take the files.
    """
    directory = directory.absolute()
    check_free(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        os.replace(temporary, directory)
        _sync(directory.parent)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
