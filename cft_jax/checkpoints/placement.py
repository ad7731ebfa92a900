"""Putting weights on devices slice by slice, so that the host never holds a copy of the model."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import Array, Shaped

from cft_jax.checkpoints.hf_names import Layout
from cft_jax.checkpoints.mxfp4 import Rows
from cft_jax.sharding.rules import sharding

# Bytes of a tensor that are in host memory at a time while it is loaded.
PIECE_BYTES = 8 * 2**20


def weight_sharding(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | None) -> Sharding:
    """Sharding of a weight by its logical axes; without a mesh, the first local device."""
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else sharding(shape, axes, mesh)


def place_stack(
    tensors: Sequence[Rows],
    layout: Layout,
    wanted: jax.ShapeDtypeStruct,
    *,
    stacked: bool,
    piece_bytes: int,
) -> Shaped[Array, "..."]:
    """An array on the devices, made of one tensor of the file per index of its leading axis.

    Args:
      tensors: the layers' tensors, or the one tensor.
      layout: between file and us, of a single layer.
      wanted: shape of the array, the leading layer axis included if `stacked`, dtype to convert to, and sharding.
      stacked: whether the array has a leading layer axis.
      piece_bytes: of the file's tensor that may be in host memory at a time.
    """
    shape, dtype, where = wanted.shape, np.dtype(wanted.dtype), wanted.sharding
    assert where is not None
    one = shape[1:] if stacked else shape
    if math.prod(shape) * dtype.itemsize <= piece_bytes:
        whole = np.empty(shape, dtype)
        for layer, tensor in enumerate(tensors):
            whole[layer if stacked else ...] = layout.to_ours(tensor.read(), one)
        return jax.make_array_from_callback(shape, where, whole.__getitem__)
    axis = layout.split_axis()
    rows = tensors[0].shape[0] // one[axis]
    step = max(1, piece_bytes // (math.prod(tensors[0].shape[1:]) * rows * tensors[0].dtype.itemsize))
    shards = _Shards(shape, dtype, where, layout.permutation())
    for layer, tensor in enumerate(tensors):
        for start in range(0, one[axis], step):
            stop = min(start + step, one[axis])
            region = [range(start, stop) if i == axis else range(n) for i, n in enumerate(one)]
            shards.write([range(layer, layer + 1), *region] if stacked else region, _Piece(tensor, layout, one, rows))
    return shards.array()


@dataclass(frozen=True)
class _Piece:
    """Reads a region of one layer's tensor, in our layout."""

    tensor: Rows
    layout: Layout
    shape: tuple[int, ...]
    rows: int

    def read(self, region: Sequence[range]) -> Shaped[np.ndarray, "..."]:
        along = region[len(region) - len(self.shape) + self.layout.split_axis()]
        data = self.tensor.read(along.start * self.rows, along.stop * self.rows)
        # JAX has no float64 by default and would narrow it with a warning.
        data = data.astype(np.float32) if data.dtype == np.float64 else data
        return self.layout.to_ours(data, self.shape)


class _Shards:
    """An array in the making: one buffer per local device, written region by region."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, where: Sharding, permutation: tuple[int, ...]) -> None:
        self.shape, self.where, self.permutation = shape, where, permutation
        self.owned = {
            device: [range(*part.indices(size)) for part, size in zip(index or (), shape, strict=True)]
            for device, index in where.addressable_devices_indices_map(shape).items()
        }
        self.buffers = {device: jnp.zeros(where.shard_shape(shape), dtype, device=device) for device in self.owned}

    def write(self, region: Sequence[range], piece: _Piece) -> None:
        """Writes one region as far as local devices own it; what none of them owns is not read."""
        data = None
        for device, own in self.owned.items():
            cut = [range(max(o.start, r.start), min(o.stop, r.stop)) for o, r in zip(own, region, strict=True)]
            if not all(cut):
                continue
            data = piece.read(region) if data is None else data
            inner = [slice(c.start - r.start, c.stop - r.start) for c, r in zip(cut, region, strict=True)]
            # Copied in the file's order, which is fast; the device transposes and converts.
            part = data[tuple(inner[len(inner) - data.ndim :])].transpose(np.argsort(self.permutation))
            start = tuple(np.int32(c.start - o.start) for c, o in zip(cut, own, strict=True))
            sent = jax.device_put(np.ascontiguousarray(part), device)
            self.buffers[device] = _write(self.buffers[device], sent, start, self.permutation)
        # Transfers run in the background and keep what they read from: wait, or the pieces pile up on the host.
        jax.block_until_ready(list(self.buffers.values()))

    def array(self) -> Shaped[Array, "..."]:
        return jax.make_array_from_single_device_arrays(self.shape, self.where, list(self.buffers.values()))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(target: Array, piece: Array, start: tuple[Array, ...], permutation: tuple[int, ...]) -> Array:
    ours = jnp.transpose(piece, permutation).astype(target.dtype)
    return jax.lax.dynamic_update_slice(target, jnp.expand_dims(ours, range(target.ndim - ours.ndim)), start)
