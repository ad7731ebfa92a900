"""Noticing SIGTERM, with which clusters announce that they will take the machine back."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption_watch(*, enabled: bool) -> Iterator[Callable[[int], bool]]:
    """While it is open, SIGTERM only raises a flag; gives the question whether to save and stop after a step.

    With several processes the hosts hear of it at different moments; then JAX's own service is asked, which makes all
    of them stop after the same step. Outside the main thread, SIGTERM is never caught.
    """
    asked = threading.Event()
    if enabled and jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    elif enabled and threading.current_thread() is threading.main_thread():
        # Nothing but a flag: a log message could interrupt another one half-way.
        previous = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
        try:
            yield lambda step: asked.is_set()
        finally:
            signal.signal(signal.SIGTERM, previous)
    else:
        yield lambda step: False
