"""Batches made and put on the devices by a thread, while the devices work."""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

import jax
import numpy as np
from jax.sharding import Mesh

from cft_jax.data.batch import TargetBatch
from cft_jax.objectives.batch_loss import DeviceBatch
from cft_jax.sharding.rules import sharding

# Batches that wait on the devices for their turn.
AHEAD = 2


def put_batch(batch: TargetBatch, mesh: Mesh) -> DeviceBatch:
    """The batch on the devices of the mesh, rows cut over its batch axes.

    Every process is given the whole batch and puts the rows of its own devices, so that the global batch is the same
    whatever the number of processes.
    """

    def put(x: np.ndarray) -> jax.Array:
        where = sharding(x.shape, ("batch", *[None] * (x.ndim - 1)), mesh)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return DeviceBatch(*map(put, batch))


class Prefetcher:
    """Iterates over the batches of steps `start` to `stop`, in order; close it, or use it as a context manager."""

    def __init__(self, make: Callable[[int], TargetBatch], mesh: Mesh, *, start: int, stop: int) -> None:
        """Starts the thread.

        Args:
          make: the batch of a step; called by the thread alone. What it raises, the iteration raises.
          mesh: to put batches on.
          start: first step.
          stop: one past the last.
        """
        self._queue: queue.Queue[DeviceBatch | BaseException | None] = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, mesh, start, stop), name="batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def __iter__(self) -> Iterator[DeviceBatch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stops the thread and waits for it; afterwards whatever makes the batches may be used by others."""
        self._closed.set()
        self._thread.join()

    def _run(self, make: Callable[[int], TargetBatch], mesh: Mesh, start: int, stop: int) -> None:
        try:
            for step in range(start, stop):
                if not self._offer(put_batch(make(step), mesh)):
                    return
            self._offer(None)
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits for the batch)
            self._offer(error)

    def _offer(self, item: DeviceBatch | BaseException | None) -> bool:
        """Waits for a place in the queue; False once closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
