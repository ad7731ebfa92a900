"""A window of steps recorded by JAX's profiler, readable in XProf and Perfetto."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from absl import logging

from cft_jax.common.errors import UserError
from cft_jax.config import profile_window


class ProfileWindow:
    """Records the steps `first` to `last`; an empty window records nothing."""

    def __init__(self, window: str, directory: Path) -> None:
        """Reads the window.

        Args:
          window: "first:last", steps counted from 1, or empty.
          directory: for the recording.

        Raises:
          UserError: the window cannot be read.
        """
        steps = profile_window(window) if window else (0, 0)
        if steps is None:
            raise UserError(f"config.log.profile={window!r} must be first:last, two step numbers from 1, as in 5:8")
        self._first, self._last = steps
        self._directory, self._recording = directory, False

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._end()

    def before(self, step: int) -> None:
        """To be called before each step."""
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._recording = True

    def after(self, step: int, result: Any) -> None:
        """To be called after each step with what it returned; waits for it at the window's end."""
        if step == self._last and self._recording:
            jax.block_until_ready(result)
            self._end()

    def _end(self) -> None:
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
            logging.info("profile of steps %d to %d in %s", self._first, self._last, self._directory)
