"""Batches made and put on the devices by a thread, while the devices work."""

import itertools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from cft_jax.data.batch import Shape, TargetBatch
from cft_jax.data.kept import KeptBatch
from cft_jax.objectives.batch_loss import DeviceBatch
from cft_jax.sharding.rules import sharding
from cft_jax.train.keep import DeviceKept

_T = TypeVar("_T")
# Batches that are made, or wait on the devices, before their turn.
AHEAD = 3


def put_batch(batch: TargetBatch, mesh: Mesh) -> DeviceBatch:
    """The batch on the devices of the mesh, rows cut over its batch axes.

    Every process is given the whole batch and puts the rows of its own devices, so that the global batch is the same
    whatever the number of processes.
    """
    return DeviceBatch(*(_put(x, mesh) for x in batch))


def abstract_batch(shape: Shape, mesh: Mesh) -> DeviceBatch:
    """Shapes, dtypes and shardings of what `put_batch` gives for a batch of this shape (B, T, P, K)."""
    B, T, P, K = shape
    shapes = {"tokens": (B, T), "positions": (B, T), "subtree_end": (B, T), "target_index": (B, P)}
    shapes |= {"target_weight": (B, P), "row_weight": (B,)}
    shapes |= dict.fromkeys(("target_position", "target_ids", "target_probs"), (B, K))

    def abstract(name: str) -> jax.ShapeDtypeStruct:
        dtype = np.float32 if name in ("target_weight", "target_probs", "row_weight") else np.int32
        where = sharding(shapes[name], ("batch", *[None] * (len(shapes[name]) - 1)), mesh)
        return jax.ShapeDtypeStruct(shapes[name], dtype, sharding=where)

    return DeviceBatch(*map(abstract, DeviceBatch._fields))  # type: ignore[arg-type]


def put_kept(kept: KeptBatch, mesh: Mesh) -> DeviceKept:
    """As `put_batch`, the rows of kept texts."""
    return DeviceKept(*(None if x is None else _put(x, mesh) for x in kept))  # type: ignore[arg-type]


def _put(x: np.ndarray, mesh: Mesh) -> jax.Array:
    where = sharding(x.shape, ("batch", *[None] * (x.ndim - 1)), mesh)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def prefetched(load: Callable[[int], _T], *, start: int, stop: int) -> Generator[_T, None, None]:
    """What `load` makes of steps `start` to `stop`, in order; what it raises is raised in that step's place.

    Only the thread calls `load`. Close the iterator (`contextlib.closing`): afterwards others may call it.
    """
    steps = iter(range(start, stop))
    pool = ThreadPoolExecutor(1, "batches")
    ahead = deque(pool.submit(load, step) for step in itertools.islice(steps, AHEAD))
    try:
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(load, step) for step in itertools.islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
