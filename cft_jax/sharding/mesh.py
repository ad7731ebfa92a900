"""The device mesh: axes `data` (batch), `fsdp` (batch, and weights cut along it), `tensor` (heads, mlp, vocabulary)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from cft_jax.common.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices, or over the given ones.

    Args:
      data: size of the axis, or -1 for all devices that the other axes leave.
      fsdp: likewise.
      tensor: likewise; at most one of the three may be -1.
      devices: jax.Device objects; defaults to `jax.devices()`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} needs {math.prod(sizes)} devices and there are "
            f"{len(devices)}; set one of config.mesh.data, fsdp, tensor to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
