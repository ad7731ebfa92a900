"""What the steps of a run measured: kept on the devices, read late, written once."""

import time
from collections import deque
from dataclasses import KW_ONLY, dataclass

import jax

from cft_jax.common.progress import Progress
from cft_jax.common.writer import MetricsWriter
from cft_jax.models.flops import Operations
from cft_jax.train.step import StepMetrics

# Steps handed to the devices before the host waits for the oldest of them: enough to keep the devices busy, few
# enough to stop soon.
RUN_AHEAD = 3


class NotFiniteError(Exception):
    """A step's loss or gradient was not finite; its arguments are the step (counted from 1) and its loss."""


@dataclass(eq=False)
class Ledger:
    """Collects the metrics of every step, one logging interval late so that the host never waits for the last step.

    Rows are written for step 1, for every `every`-th step and for the last. The clock starts when it is made.

    Attributes:
      writer: of the rows; closed when the ledger is left as a context manager.
      progress: advanced with every step.
      every: steps between two rows.
      done: steps done earlier.
      stop: the last step of this run.
      steps_per_epoch: for the rows' `epoch`.
      examples_per_step: mean number of strings (prompts for `exact`) in a batch.
      operations: of a step.
      peak: operations per second of all devices together; None where it is not known.
      stop_on_nonfinite: whether a loss or gradient that is not finite raises.
    """

    writer: MetricsWriter
    progress: Progress
    _: KW_ONLY
    every: int
    done: int
    stop: int
    steps_per_epoch: int
    examples_per_step: float
    operations: Operations
    peak: float | None
    stop_on_nonfinite: bool

    def __post_init__(self):
        self._computed = 0
        self._pending: deque[tuple[int, float, StepMetrics]] = deque()
        self._last_logged = (self.done, time.monotonic())

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a step just handed to the devices; waits if too many are under way.

        Raises:
          NotFiniteError: in a step of an earlier interval.
        """
        if len(self._pending) >= RUN_AHEAD:
            jax.block_until_ready(self._pending[-RUN_AHEAD][2].loss)
        previous = self._pending[-1][0] if self._pending else 0
        self._pending.append((step, time.monotonic(), metrics))
        self.progress.advance(1)
        if self._is_logged(step):
            self._collect(previous)

    def drain(self) -> None:
        """Reads and writes everything there is, and makes it survive a crash.

        Raises:
          NotFiniteError: in a step not read before.
        """
        self._collect(self.stop)
        self.writer.sync()

    def _is_logged(self, step: int) -> bool:
        return step == 1 or step % self.every == 0 or step == self.stop

    def _collect(self, last: int) -> None:
        due = []
        while self._pending and self._pending[0][0] <= last:
            due.append(self._pending.popleft())
        values = jax.device_get([metrics for _, _, metrics in due])
        for (step, moment, _), found in zip(due, values, strict=True):
            if self.stop_on_nonfinite and not found.finite:
                raise NotFiniteError(step, float(found.loss))
            self._computed += self.operations.count(tokens=int(found.tokens), steps=int(found.steps))
            if self._is_logged(step):
                self._write(step, moment, found)

    def _write(self, step: int, moment: float, metrics: StepMetrics) -> None:
        before, then = self._last_logged
        seconds = (moment - then) / (step - before)
        self._last_logged = (step, moment)
        row = {
            "epoch": step / self.steps_per_epoch,
            "loss": float(metrics.loss),
            **({} if metrics.keep_loss is None else {"keep_loss": float(metrics.keep_loss)}),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "examples_per_second": self.examples_per_step / max(seconds, 1e-9),
            "step_seconds": seconds,
            "padding_fraction": float(metrics.padding_fraction),
        }
        if self.peak is not None:
            row["model_flops_utilization"] = self._computed / max(moment - then, 1e-9) / self.peak
        self._computed = 0
        if not self.stop_on_nonfinite:
            row["skipped_steps"] = int(metrics.skipped)
        self.writer.write(step, row)
        self.progress.advance(0, loss=row["loss"])
