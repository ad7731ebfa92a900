"""The device mesh: axes `data` (batch), `fsdp` (batch, and weights cut along it), `tensor` (heads, mlp, vocabulary)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from cft_jax.common.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with axes of the given sizes over all devices, or over the given `jax.Device` objects.

    At most one of the sizes may be -1, which takes all devices that the other axes leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    named = f"config.mesh has data={data}, fsdp={fsdp}, tensor={tensor}"
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if len(devices) % known:
            raise UserError(
                f"{named}, and {len(devices)} devices cannot be cut into {known}; set sizes that divide them"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    elif known != len(devices):
        raise UserError(f"{named}, which needs {known} devices of {len(devices)}; set one of the sizes to -1")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
