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
    sizes = mesh_sizes(data, fsdp, tensor, count=len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_sizes(data: int, fsdp: int, tensor: int, *, count: int) -> tuple[int, int, int]:
    """The sizes of a mesh over so many devices; see `make_mesh`."""
    sizes = [data, fsdp, tensor]
    named = f"config.mesh has data={data}, fsdp={fsdp}, tensor={tensor}"
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if count % known:
            raise UserError(f"{named}, and {count} devices cannot be cut into {known}; set sizes that divide them")
        sizes[sizes.index(-1)] = count // known
    elif known != count:
        raise UserError(f"{named}, which needs {known} devices of {count}; set one of the sizes to -1")
    return sizes[0], sizes[1], sizes[2]


def platform(mesh: Mesh | None) -> str:
    """What a program on the mesh runs on: "cpu", "gpu" or "tpu", also where it is only compiled here; see `jax.Device`.

    Without a mesh, JAX's default.
    """
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
