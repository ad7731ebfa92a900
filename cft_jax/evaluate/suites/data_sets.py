"""Rows of data sets: from the hub, a directory in its format, or a file of JSON lines."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError


def data_set_rows(source: str, config: str | None, split: str, *, fix: str) -> list[dict[str, Any]]:
    """All rows of a data set's split, read by `datasets`.

    Args:
      source: hub id or directory.
      config: name of the data set's configuration, where it has several.
      split: name of the split.
      fix: what to do where it cannot be had; completes "check the network, or ...".

    Raises:
      UserError: `datasets` is not installed, or the data set cannot be had.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(f"the data set {source} is read by `datasets` ({error}): pip install datasets") from error
    try:
        return [dict(row) for row in datasets.load_dataset(source, config, split=split)]
    except (OSError, ValueError, DatasetsError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data set {source} (split {split}) cannot be had: {first}; check the network, or {fix}"
        ) from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a file, compressed if its name ends in .gz, each with its number; empty ones are left out.

    Raises:
      UserError: a line is no JSON, or the file cannot be read.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: line {number} is no JSON ({error}); copy the file again") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read after line {number} ({error}); copy the file again") from error
