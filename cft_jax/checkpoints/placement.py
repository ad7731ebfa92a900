"""Putting weights on devices slice by slice, so that the host never holds a copy of the model."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import Array, Shaped

from cft_jax.checkpoints.hf_names import Layout
from cft_jax.checkpoints.tensor_files import Rows
from cft_jax.sharding.rules import sharding

# Bytes of a tensor that are in host memory at a time while it is loaded.
PIECE_BYTES = 64 * 2**20


def weight_sharding(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | None) -> Sharding:
    """Sharding of a weight by its logical axes; without a mesh, the first local device."""
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else sharding(shape, axes, mesh)


def place_stack(
    tensors: Sequence[Rows],
    layout: Layout,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: Sharding,
    *,
    stacked: bool,
    piece_bytes: int,
) -> Shaped[Array, "..."]:
    """An array on the devices, made of one tensor of the file per index of its leading axis.

    Args:
      tensors: the layers' tensors, or the one tensor.
      layout: between file and us, of a single layer.
      shape: of the array, the leading layer axis included if `stacked`.
      dtype: to convert to.
      where: the array's sharding.
      stacked: whether the array has a leading layer axis.
      piece_bytes: of the file's tensor that may be in host memory at a time.
    """
    one = shape[1:] if stacked else shape
    axis = layout.split_axis()
    block = math.prod(tensors[0].shape[1:]) * (tensors[0].shape[0] // one[axis]) * tensors[0].dtype.itemsize
    step = max(1, piece_bytes // block)
    if math.prod(shape) * dtype.itemsize <= piece_bytes:
        whole = np.empty(shape, dtype)
        for layer, tensor in enumerate(tensors):
            whole[layer if stacked else ...] = layout.to_ours(tensor.read(0, tensor.shape[0]), one)
        return jax.make_array_from_callback(shape, where, lambda index: whole[index])
    indices = {device: index or () for device, index in where.addressable_devices_indices_map(shape).items()}
    shards = {device: jnp.zeros(where.shard_shape(shape), dtype, device=device) for device in indices}
    for layer, tensor in enumerate(tensors):
        for start in range(0, one[axis], step):
            stop = min(start + step, one[axis])
            lead = (slice(layer, layer + 1),) if stacked else ()
            region = (*lead, *(slice(start, stop) if i == axis else slice(0, n) for i, n in enumerate(one)))
            _place_piece(shards, indices, shape, region, functools.partial(_read, tensor, layout, one, start, stop))
    return jax.make_array_from_single_device_arrays(shape, where, list(shards.values()))


def _read(tensor: Rows, layout: Layout, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    per = tensor.shape[0] // shape[layout.split_axis()]
    return layout.to_ours(tensor.read(start * per, stop * per), shape)


def _place_piece(
    shards: dict[Any, Array],
    indices: dict[Any, tuple[slice, ...]],
    shape: tuple[int, ...],
    region: tuple[slice, ...],
    read: Callable[[], np.ndarray],
) -> None:
    """Writes one region of the array, as far as local devices hold it, into their shards (by device)."""
    piece = None
    for device, index in indices.items():
        own = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        cut = [range(max(o.start, r.start), min(o.stop, r.stop)) for o, r in zip(own, region, strict=True)]
        if not all(cut):
            continue
        if piece is None:
            piece = read()
        lead = len(region) - piece.ndim
        inner = tuple(slice(c.start - r.start, c.stop - r.start) for c, r in zip(cut, region, strict=True))[lead:]
        target = shards[device]
        update = np.ascontiguousarray(piece[inner], dtype=target.dtype).reshape([len(c) for c in cut])
        start = tuple(np.int32(c.start - o.start) for c, o in zip(cut, own, strict=True))
        shards[device] = _write(target, jax.device_put(update, device), start)
    # Transfers run in the background and keep their buffers: wait, or the pieces pile up on the host.
    jax.block_until_ready(list(shards.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _write(target: Array, piece: Array, start: tuple[Array, ...]) -> Array:
    return jax.lax.dynamic_update_slice(target, piece, start)
