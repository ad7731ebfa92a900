"""Batches made and put on the devices by a thread, while the devices work."""

import itertools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from cft_jax.data.batch import Shape, TargetBatch
from cft_jax.objectives.batch_loss import DeviceBatch
from cft_jax.sharding.rules import sharding

# Batches that are made, or wait on the devices, before their turn.
AHEAD = 3


def put_batch(batch: TargetBatch, mesh: Mesh) -> DeviceBatch:
    """The batch on the devices of the mesh, rows cut over its batch axes.

    Every process is given the whole batch and puts the rows of its own devices, so that the global batch is the same
    whatever the number of processes.
    """

    def put(x: np.ndarray) -> jax.Array:
        where = sharding(x.shape, ("batch", *[None] * (x.ndim - 1)), mesh)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return DeviceBatch(*map(put, batch))


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


def prefetched(
    make: Callable[[int], TargetBatch], mesh: Mesh, *, start: int, stop: int
) -> Generator[DeviceBatch, None, None]:
    """The batches of steps `start` to `stop`, in order; what `make` raises is raised in its batch's place.

    Only the thread calls `make`. Close the iterator (`contextlib.closing`): afterwards others may call it.
    """

    def load(step: int) -> DeviceBatch:
        return put_batch(make(step), mesh)

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
