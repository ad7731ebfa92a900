"""Putting weights on devices slice by slice, so that the host never holds a copy of the model."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from cft_jax.checkpoints.hf_names import Layout, Name
from cft_jax.checkpoints.mxfp4 import Rows
from cft_jax.sharding.rules import sharding

# Bytes of a tensor that are in host memory at a time while it is loaded.
PIECE_BYTES = 8 * 2**20


def abstract_weight(
    shape: Sequence[int], dtype: DTypeLike, axes: Sequence[str | None], mesh: Mesh | None
) -> jax.ShapeDtypeStruct:
    """A weight's shape and dtype, sharded by its logical axes; without a mesh, on the first local device."""
    where = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else sharding(shape, axes, mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def place_stack(
    tensors: Sequence[Rows], name: Name, wanted: jax.ShapeDtypeStruct, *, piece_bytes: int
) -> Shaped[Array, "..."]:
    """An array on the devices, made of one tensor of the file per index of its leading axis.

    Args:
      tensors: the layers' tensors, or the one tensor.
      name: of one of them, with its layout.
      wanted: shape of the array, its leading layer axis included, dtype to convert to, and sharding.
      piece_bytes: of the file's tensor that may be in host memory at a time.
    """
    shape, dtype, where = wanted.shape, np.dtype(wanted.dtype), wanted.sharding
    assert where is not None
    layout, stacked = name.layout, name.layer is not None
    one = shape[1:] if stacked else shape
    if math.prod(shape) * dtype.itemsize <= piece_bytes:
        whole = np.empty(shape, dtype)
        for layer, tensor in enumerate(tensors):
            whole[layer if stacked else ...] = layout.to_ours(tensor.read(), one)
        return jax.make_array_from_callback(shape, where, whole.__getitem__)
    axis = layout.split_axis()
    rows = tensors[0].shape[0] // one[axis]
    step = max(1, piece_bytes // (math.prod(tensors[0].shape[1:]) * rows * tensors[0].dtype.itemsize))
    owned = {
        device: [range(*part.indices(size)) for part, size in zip(index or (), shape, strict=True)]
        for device, index in where.addressable_devices_indices_map(shape).items()
    }
    buffers = {device: jnp.zeros(where.shard_shape(shape), dtype, device=device) for device in owned}
    for layer, tensor in enumerate(tensors):
        for start in range(0, one[axis], step):
            stop = min(start + step, one[axis])
            region = [range(start, stop) if i == axis else range(n) for i, n in enumerate(one)]
            region = [range(layer, layer + 1), *region] if stacked else region
            read = functools.partial(_read, tensor, layout, one, start * rows, stop * rows)
            _write_region(buffers, owned, region, read, layout.permutation())
    return jax.make_array_from_single_device_arrays(shape, where, list(buffers.values()))


def _read(tensor: Rows, layout: Layout, shape: tuple[int, ...], start: int, stop: int) -> Shaped[np.ndarray, "..."]:
    """Rows of one layer's tensor, in our layout."""
    data = tensor.read(start, stop)
    # JAX has no float64 by default and would narrow it with a warning.
    return layout.to_ours(data.astype(np.float32) if data.dtype == np.float64 else data, shape)


def _write_region(
    buffers: dict[Any, Array],  # by device
    owned: Mapping[Any, list[range]],
    region: Sequence[range],
    read: Callable[[], Shaped[np.ndarray, "..."]],
    permutation: tuple[int, ...],
) -> None:
    """Writes one region as far as local devices own it; what none of them owns is not read."""
    data = None
    for device, own in owned.items():
        cut = [range(max(o.start, r.start), min(o.stop, r.stop)) for o, r in zip(own, region, strict=True)]
        if not all(cut):
            continue
        data = read() if data is None else data
        inner = [slice(c.start - r.start, c.stop - r.start) for c, r in zip(cut, region, strict=True)]
        # Copied in the file's order, which is fast; the device transposes and converts.
        part = data[tuple(inner[len(inner) - data.ndim :])].transpose(np.argsort(permutation))
        start = tuple(np.int32(c.start - o.start) for c, o in zip(cut, own, strict=True))
        sent = jax.device_put(np.ascontiguousarray(part), device)
        buffers[device] = _write(buffers[device], sent, start, permutation)
    # Transfers run in the background and keep what they read from: wait, or the pieces pile up on the host.
    jax.block_until_ready(list(buffers.values()))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(target: Array, piece: Array, start: tuple[Array, ...], permutation: tuple[int, ...]) -> Array:
    ours = jnp.transpose(piece, permutation).astype(target.dtype)
    return jax.lax.dynamic_update_slice(target, jnp.expand_dims(ours, range(target.ndim - ours.ndim)), start)
