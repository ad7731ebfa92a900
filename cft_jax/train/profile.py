"""A window of steps recorded by JAX's profiler, readable in XProf and Perfetto."""

import contextlib
from pathlib import Path
from typing import Any

import jax
from absl import logging

from cft_jax.common.errors import UserError
from cft_jax.config import profile_window


class ProfileWindow(contextlib.ExitStack):
    """Records a window of steps "first:last", counted from 1, in a directory; an empty window records nothing."""

    def __init__(self, window: str, directory: Path) -> None:
        """Reads the window.

        Raises:
          UserError: it cannot be read.
        """
        super().__init__()
        steps = profile_window(window) if window else (0, 0)
        if steps is None:
            raise UserError(f"config.log.profile={window!r} must be first:last, two step numbers from 1, as in 5:8")
        self._first, self._last = steps
        self._directory = directory

    def before(self, step: int) -> None:
        """To be called before each step."""
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self.callback(self._end)

    def after(self, step: int, result: Any) -> None:
        """To be called after each step with what it returned; waits for it at the window's end."""
        if step == self._last:
            jax.block_until_ready(result)
            self.close()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        logging.info("profile of steps %d to %d in %s", self._first, self._last, self._directory)
