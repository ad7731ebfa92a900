"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from absl import logging
from tqdm import tqdm

# Between two lines of a log that is no terminal.
LOG_SECONDS = 30.0


class Progress:
    """Counts units of work and shows throughput and time left.

    On a terminal this is a tqdm bar. Elsewhere (a log file, CI) a line is logged every half minute, and one at the
    end of anything that took as long. Where absl's verbosity is below INFO (`--quiet`, processes other than the
    first, a library's use) nothing is shown.

    Use it as a context manager:

        with Progress("evaluate", total=591, unit="prompt") as progress:
            for prompt in prompts:
                ...
                progress.advance(1, kl=0.03)
    """

    def __init__(self, what: str, *, total: int, unit: str, done: int = 0) -> None:
        """Starts counting.

        Args:
          what: name of the work.
          total: units in all, those already done included.
          unit: name of one unit, singular.
          done: units done earlier (a resumed run); they do not count towards the throughput.
        """
        self._what, self._total, self._unit = what, total, unit
        self._first: int | float = done
        self._done: int | float = done
        self._start = self._logged = time.monotonic()
        self._logged_done: int | float = done
        self._notes: dict[str, float] = {}
        shown = logging.level_info()
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}s", dynamic_ncols=True, leave=True)
        self._lines = shown and self._bar is None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.close()
        elif self._lines and kind is None and time.monotonic() - self._start >= LOG_SECONDS:
            if self._logged_done != self._done or self._done == self._first:
                self._log(since=(self._start, self._first))

    def advance(self, count: int | float = 1, **notes: float) -> None:
        """Adds finished units; `notes` are figures worth seeing beside them (the loss, say)."""
        self._done += count
        self._notes.update(notes)
        if self._bar is not None:
            if notes:
                self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._notes.items()}, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._logged >= LOG_SECONDS:
            self._log(since=(self._logged, self._logged_done))

    def _log(self, since: tuple[float, int | float]) -> None:
        """Logs where the work stands; its speed is that since a moment and the units done then.

        Between lines it is the speed of late: the first units wait for XLA to compile and would foretell too long.
        """
        self._logged, self._logged_done = time.monotonic(), self._done
        rate = (self._done - since[1]) / max(self._logged - since[0], 1e-9)
        left = f", {_duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        notes = "".join(f", {name} {value:.4g}" for name, value in self._notes.items())
        speed = f"{rate:.3g} {self._unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s/{self._unit}"
        logging.info("%s: %d/%d %ss, %s%s%s", self._what, self._done, self._total, self._unit, speed, left, notes)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
