"""The files that a suite leaves beside `summary.json`, and the fingerprint of what it measured."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically, write_json

SUMMARY = "summary.json"
TABLE = "per_prompt.csv"
SAMPLES = "samples.jsonl.gz"
STORE = "per_prompt.jsonl"
# `suite` of the summary over several suites, each of which has a directory of its own beside it.
ALL = "all"


def fingerprint_of(*parts: Any) -> str:
    """Identifies weights, tokens and settings, all of them JSON values: equal parts, equal text, in any process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_results(
    directory: Path,
    summary: Mapping[str, Any],
    *,
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Writes `per_prompt.csv`, `samples.jsonl.gz` and, last, `summary.json`, which stands for a finished evaluation."""
    write_atomically(directory / TABLE, csv_table(rows))
    write_atomically(directory / SAMPLES, gzip_lines(samples))
    write_json(directory / SUMMARY, summary)


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV file with a column for every name in any row, in the order of first appearance; absent is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def gzip_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
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
