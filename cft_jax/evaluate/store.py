"""Results of finished prompts, kept as they come, so that a killed evaluation resumes where it stopped."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically
from cft_jax.common.progress import Progress

Record = dict[str, Any]
Key = tuple[str, str]
_Item = TypeVar("_Item")


class ResultStore:
    """A JSONL file with one record per finished prompt.

    Every line carries the fingerprint of the weights and settings it was measured with; lines of another fingerprint
    are left alone and ignored. A last line that a crash cut off is removed on opening. The processes of a run open it
    together, and all of them begin with what process 0 finds.
    """

    def __init__(self, path: Path, *, fingerprint: str, write: bool) -> None:
        """Opens the file, which need not exist; `write` says whether this process, process 0, writes.

        Raises:
          UserError: a line other than the last is damaged.
        """
        self._fingerprint = fingerprint
        content = agreed(_whole_lines(path))
        self._records = {(r["split"], r["task_id"]): r for r in _records(path, content, fingerprint)}
        self._file = None
        if write:
            write_atomically(path, content)
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: Key) -> Record:
        return self._records[key]

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds the record of one prompt, named by its `split` and `task_id`, and flushes it.

        Raises:
          ValueError: the prompt has a record already, or the record holds NaN or an infinity, which JSON lacks.
        """
        key = (record["split"], record["task_id"])
        if key in self._records:
            raise ValueError(f"{key} has a record already")
        line = json.dumps({"fingerprint": self._fingerprint, "record": record}, allow_nan=False)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
        # What a resumed run would read, so that both see the same numbers.
        self._records[key] = json.loads(line)["record"]


def run_resumable(
    store: ResultStore,
    items: Sequence[_Item],
    key: Callable[[_Item], Key],
    measure: Callable[[Sequence[_Item]], Iterable[Record]],
    *,
    at_once: int,
    what: str,
    unit: str,
) -> list[Record]:
    """The records of all items, in order: those in the store, and new ones, kept as they come.

    The same items are always measured together: where one of them is missing, all are asked again, so that no metric
    depends on where a run was killed.

    `key` is an item's split and name. `measure` makes the records of up to `at_once` items, in order; a killed run
    repeats at most these. `what` and `unit` name the work and an item where the progress is shown.
    """
    done = sum(key(item) in store for item in items)
    with Progress(what, total=len(items), unit=unit, done=done) as progress:
        for start in range(0, len(items), at_once):
            chunk = items[start : start + at_once]
            missing = sum(key(item) not in store for item in chunk)
            if not missing:
                continue
            for item, record in zip(chunk, measure(chunk), strict=True):
                if key(item) not in store:
                    store.append(record)
            progress.advance(missing)
    return [store[key(item)] for item in items]


def read_records(path: Path, fingerprint: str) -> list[Record]:
    """The records of a finished evaluation, which its summary names by their fingerprint; empty without a file.

    Raises:
      UserError: a line other than the last is damaged.
    """
    return _records(path, _whole_lines(path), fingerprint)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _records(path: Path, content: bytes, fingerprint: str) -> list[Record]:
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            _ = row["fingerprint"], row["record"]["split"], row["record"]["task_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is damaged ({error}); delete the line and repeat") from None
        if row["fingerprint"] == fingerprint:
            records.append(row["record"])
    return records


def agreed(content: bytes) -> bytes:
    """The bytes that process 0 has, in every process: hosts may have no common disk, or see a file a moment later."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    own = np.frombuffer(content, np.uint8) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own), np.uint8).tobytes()
