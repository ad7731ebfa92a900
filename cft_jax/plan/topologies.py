"""Accelerators by the names that people write, v5litepod-16 or 8xH100, and the devices that libtpu compiles for."""

import difflib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cft_jax.common.compilation import set_tpu_flags
from cft_jax.common.errors import UserError

# Chips of a slice, and how they lie: two dimensions for v5e and v6e, three for the others.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """One generation of TPU.

    Attributes:
      kind: `jax.Device.device_kind`.
      shapes: of its slices, by number of chips.
      cores_per_chip: what the number in its names counts.
      devices_per_chip: JAX devices.
      memory: GiB that the compiler may use of a device (its error messages name them).
      clock: cycles per second, the maker's peak divided by what the matrix units do in a cycle.
    """

    kind: str
    shapes: dict[int, str]
    cores_per_chip: int
    devices_per_chip: int
    memory: float
    clock: float


GENERATIONS = {
    "v4": Generation("TPU v4", _CUBIC, 2, 1, 30.75, 1.05e9),
    "v5e": Generation("TPU v5 lite", _FLAT, 1, 1, 15.75, 1.5e9),
    "v5p": Generation("TPU v5", _CUBIC, 2, 1, 95.74, 1.75e9),
    "v6e": Generation("TPU v6 lite", _FLAT, 1, 1, 31.25, 1.75e9),
    "tpu7x": Generation("TPU7x", _CUBIC, 2, 2, 94.75, 2.2e9),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6litepod": "v6e", "v7x": "tpu7x", "tpuv7x": "tpu7x"}
# GiB of one GPU, by the name that its `device_kind` begins with after the maker's.
_GPUS = {
    "a100": ("NVIDIA A100", 40), "a100-80gb": ("NVIDIA A100", 80), "h100": ("NVIDIA H100", 80),
    "h200": ("NVIDIA H200", 141), "b200": ("NVIDIA B200", 180), "l4": ("NVIDIA L4", 24), "l40s": ("NVIDIA L40S", 48),
    "a10g": ("NVIDIA A10G", 24),
}  # fmt: skip
# libtpu asks no one what machine this is, loads in several processes, and keeps its warnings of both to itself.
_QUIETLY = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
}  # fmt: skip
_EXAMPLES = ("v4-8", "v5e-16", "v5p-8", "v6e-8", "tpu7x-8", "h100-8")
_GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Topology:
    """Devices of one kind that work together.

    Attributes:
      name: as it was given.
      kind: `jax.Device.device_kind`.
      devices: how many JAX devices.
      memory: bytes that a program may use of each.
      clock: cycles per second; None where no compiler here counts cycles.
      libtpu: its name for the TPU's compiler; empty for a GPU.
      chips: what that compiler is told to build.
    """

    name: str
    kind: str
    devices: int
    memory: int
    clock: float | None = None
    libtpu: str = ""
    chips: int = 0


def topology(name: str) -> Topology:
    """The topology of a name: v5litepod-16, v5e-16, v6e-8, v5p-8 (of four chips), v4-8, tpu7x-8, h100-8, 8xH100.

    Raises:
      UserError: there is no such one; the message has the nearest name.
    """
    plain = name.strip().lower().removeprefix("tpu-")
    if found := re.fullmatch(r"(\d+)\s*[x×]\s*(\w[\w-]*)", plain):
        plain = f"{found[2]}-{found[1]}"
    kind, _, count = plain.rpartition("-")
    kind = _ALIASES.get(kind, kind)
    if count.isdigit() and (kind, int(count)) in set(_known()):
        return _gpu(name, kind, int(count)) if kind in _GPUS else _tpu(name, kind, int(count))
    near = _nearest(kind, int(count)) if count.isdigit() else ""
    known = [f"{kind}-{count}" for kind, count in _known()]
    known += [f"{alias}-{count}" for kind, count in _known() for alias, own in _ALIASES.items() if own == kind]
    near = near or difflib.get_close_matches(plain, known, n=1, cutoff=0.0)[0]
    raise UserError(f"--topology={name} is unknown; the nearest is {near} (others: {', '.join(_EXAMPLES)})")


def _nearest(kind: str, count: int) -> str:
    """The name of the same kind with the nearest number; empty where there is no such kind."""
    counts = [known for name, known in _known() if name == kind]
    return f"{kind}-{min(counts, key=lambda known: (abs(known - count), known))}" if counts else ""


def _known() -> Iterator[tuple[str, int]]:
    for kind, generation in GENERATIONS.items():
        for chips in generation.shapes:
            yield kind, chips * generation.cores_per_chip
    for kind in _GPUS:
        for count in _GPU_COUNTS:
            yield kind, count


def _tpu(name: str, kind: str, count: int) -> Topology:
    generation = GENERATIONS[kind]
    chips = count // generation.cores_per_chip
    return Topology(
        name,
        generation.kind,
        chips * generation.devices_per_chip,
        int(generation.memory * _GIB),
        generation.clock,
        f"{kind}:{generation.shapes[chips]}",
        chips,
    )


def _gpu(name: str, kind: str, count: int) -> Topology:
    # As much as JAX takes of a GPU by itself (XLA_PYTHON_CLIENT_MEM_FRACTION).
    device, gib = _GPUS[kind]
    return Topology(name, device, count, int(0.75 * gib * _GIB))


def larger(of: Topology) -> Iterator[Topology]:
    """The topologies of the same kind with more devices, ascending."""
    for kind, count in _known():
        found = _gpu(f"{kind}-{count}", kind, count) if kind in _GPUS else _tpu(f"{kind}-{count}", kind, count)
        if (found.kind, found.memory) == (of.kind, of.memory) and found.devices > of.devices:
            yield found


def compiler_devices(of: Topology) -> Sequence[Any] | None:
    """`jax.Device`s to compile for: libtpu's, which stand for no hardware, or GPUs of this machine; None without.

    Raises:
      UserError: libtpu is absent, or knows no such topology.
    """
    import jax

    if not of.libtpu:
        here = [device for device in jax.devices() if device.device_kind.startswith(of.kind)]
        return here[: of.devices] if len(here) >= of.devices else None
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f'--topology={of.name} is compiled for by libtpu, which is absent: pip install -e ".[plan]"')
    set_tpu_flags()
    for name, value in _QUIETLY.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    host = (1, 1, 1) if of.chips == 1 else (2, 2, 1)
    more = {"chip_config_name": "megacore"} if of.libtpu.startswith("v4") else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=of.libtpu, chips_per_host_bounds=host, **more
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={of.name}: this libtpu cannot compile for it ({reason}); try another") from error
    assert len(found.devices) == of.devices, (of, len(found.devices))
    return found.devices


def libtpu_version() -> dict[str, str]:
    """The version of libtpu by its name; empty where there is none."""
    try:
        return {"libtpu": importlib.metadata.version("libtpu")}
    except importlib.metadata.PackageNotFoundError:
        return {}
