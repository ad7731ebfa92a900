"""`metrics.jsonl`: what a run measured, one JSON object per logged step."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically

Mirror = Callable[[int, Mapping[str, float]], None]


class MetricsWriter:
    """Appends rows to a run's `metrics.jsonl`; each step stands in it once, whatever interrupted the run.

    Opening it for a run that resumes after `step` drops rows beyond that step (they will be measured again) and a line
    that a crash left half-written. Rows are flushed as they are written.
    """

    def __init__(self, path: Path, *, after_step: int, enabled: bool, mirror: Mirror | None = None) -> None:
        """Opens the file.

        Args:
          path: of the file; its directory is made.
          after_step: the last step already done, 0 for a new run.
          enabled: whether this process writes; process 0 does.
          mirror: handed each row's step and values once they are written.

        Raises:
          OSError: the place is not writable.
        """
        self._last, self._mirror = after_step, mirror
        self._file = None
        if enabled:
            kept = [json.dumps(row) for row in read_metrics(path) if row["step"] <= after_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row. Numbers that JSON lacks (NaN, infinities) are written as null.

        Raises:
          ValueError: the step was written before, or steps run backwards.
        """
        if step <= self._last:
            raise ValueError(f"step {step} is not beyond the last row, step {self._last}")
        self._last = step
        if self._file is not None:
            row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if self._mirror is not None:
                self._mirror(step, values)

    def sync(self) -> None:
        """Makes the rows survive a crash of the machine; called before a checkpoint that they belong to."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; the writer is done."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, in order; a last line that a crash cut off is left out, and so is an absent file.

    Raises:
      UserError: a line other than the last is damaged.
    """
    if not path.exists():
        return []
    rows = []
    # What follows the last line's end was cut off.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged ({error}); delete the line and repeat") from None
    return rows
