"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
from typing import Any

from absl import logging
from tqdm import tqdm

# Between two lines of a log that is no terminal.
LOG_SECONDS = 30.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {rate_fmt}, {remaining} left{postfix}"


class _Log:
    """What tqdm takes for a terminal: every line is logged."""

    def write(self, text: str) -> None:
        """Logs a line; tqdm also writes line ends and spaces of their own."""
        if line := " ".join(text.split()):
            logging.info("%s", line)

    def flush(self) -> None:
        """Nothing is held back."""


class Progress:
    """Counts units of work and shows throughput and time left, by tqdm.

    On a terminal this is a bar. Elsewhere (a log file, CI) a line is logged every half minute, and one at the end of
    anything that took as long; its speed is that since the line before, since the first units wait for XLA to compile
    and would foretell too long. Where absl's verbosity is below INFO (`--quiet`, processes other than the first, a
    library's use) nothing is shown.

    Use it as a context manager:

        with Progress("evaluate", total=591, unit="prompt") as progress:
            for prompt in prompts:
                ...
                progress.advance(1, kl=0.03)
    """

    def __init__(self, what: str, *, total: int, unit: str, done: int = 0) -> None:
        """Starts counting the units of the work named `what`; those `done` earlier do not count towards the speed."""
        options: dict[str, Any] = {"total": total, "initial": done, "desc": what, "disable": not logging.level_info()}
        self._logs = logging.level_info() and not sys.stderr.isatty()
        if not self._logs:
            self._bar = tqdm(**options, unit=f" {unit}s", dynamic_ncols=True)
        else:
            now_and_then = {"mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "miniters": 0, "smoothing": 1}
            self._bar = tqdm(**options, unit=unit, file=_Log(), position=0, bar_format=_LINE, **now_and_then)
        self._notes: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._logs and (any(error) or self._bar.n == self._bar.last_print_n):
            self._bar.leave = False  # no line that says nothing new
        self._bar.close()

    def advance(self, count: int | float = 1, **notes: float) -> None:
        """Adds finished units; `notes` are metrics worth seeing beside them (the loss, say)."""
        if notes:
            self._notes |= notes
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._notes.items()}, refresh=False)
        self._bar.update(count)
