"""Noticing SIGTERM, with which clusters announce that they will take the machine back."""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class PreemptionWatch:
    """While it is open, SIGTERM only raises a flag, which the training loop asks for between steps.

    With several processes the hosts hear of it at different moments; then JAX's own service is asked, which makes all
    of them stop after the same step.
    """

    def __init__(self, *, enabled: bool) -> None:
        """Prepares the watch.

        Args:
          enabled: whether SIGTERM is caught at all; it never is outside the main thread.
        """
        self._enabled = enabled
        self._asked = threading.Event()
        self._handles = enabled and jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        self._previous = None

    def __enter__(self) -> "PreemptionWatch":
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)

    def asked_to_stop(self, step: int) -> bool:
        """Whether to save and stop after this step; with several processes the same answer in all of them."""
        if self._enabled and jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing but a flag: a log message could interrupt another one half-way.
        self._asked.set()
