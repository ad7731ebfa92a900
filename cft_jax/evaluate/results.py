"""The files that a suite leaves, and the fingerprint of what it measured."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically, write_json
from cft_jax.evaluate.store import ResultStore

SUMMARY = "summary.json"
TABLE = "per_prompt.csv"
SAMPLES = "samples.jsonl.gz"
STORE = "per_prompt.jsonl"
# `suite` of the summary over several suites, each of which has a directory of its own beside it.
ALL = "all"
Row = Mapping[str, Any]


def fingerprint_of(*parts: Any) -> str:
    """Identifies weights, tokens and settings, all of them JSON values: equal parts, equal text, in any process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Results:
    """Where the results of a suite go; `checkpoint` names what is measured, `write` is for process 0."""

    directory: Path
    checkpoint: str
    write: bool

    def store(self, fingerprint: str, name: str = STORE) -> ResultStore:
        """The store of finished prompts in the file `name`; see `ResultStore`."""
        return ResultStore(self.directory / name, fingerprint=fingerprint, write=self.write)

    def finish(
        self, suite: str, fingerprint: str, settings: Row, metrics: Row, *, rows: Sequence[Row], samples: Sequence[Row]
    ) -> dict[str, Any]:
        """Writes `per_prompt.csv`, `samples.jsonl.gz` and, last, `summary.json`, which stands for a finished suite.

        Returns the summary: what was measured, the settings, then the metrics.
        """
        head = {"suite": suite, "checkpoint": self.checkpoint, "fingerprint": fingerprint, "settings": settings}
        summary = head | dict(metrics)
        if self.write:
            write_atomically(self.directory / TABLE, csv_table(rows))
            write_atomically(self.directory / SAMPLES, gzip_lines(samples))
            write_json(self.directory / SUMMARY, summary)
        return summary


def csv_table(rows: Sequence[Row]) -> str:
    """A CSV file with a column for every name in any row, in the order of first appearance; absent is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def gzip_lines(rows: Sequence[Row]) -> bytes:
    """JSON lines, compressed; equal rows give equal bytes."""
    return gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode(), mtime=0)


def read_summary(directory: Path) -> dict[str, Any] | None:
    """`summary.json` of an evaluation; None where there is none.

    Raises:
      UserError: the file is damaged, or no summary of an evaluation.
    """
    path = directory / SUMMARY
    summary = read_json(path)
    if summary is not None and "suite" not in summary:
        raise UserError(f"{path} is not the summary of an evaluation; give the --workdir of cft_jax.evaluate")
    return summary


def read_json(path: Path) -> dict[str, Any] | None:
    """A record that a suite wrote; None where there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and repeat the evaluation") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no record; delete it and repeat the evaluation")
    return found
