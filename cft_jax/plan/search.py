"""Settings by which a run may fit where its own do not: mesh, recomputed activations, microbatches."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh

from cft_jax.config import Config
from cft_jax.models.memory import Batch, MemoryEstimate, estimate_memory, micro_batches
from cft_jax.models.transformer import REMAT
from cft_jax.plan.programs import Work, row_multiple
from cft_jax.plan.topologies import Topology
from cft_jax.runs.base import model_options
from cft_jax.sharding.mesh import AXES, mesh_sizes

# The estimate is off by some percent; what it finds is compiled.
_USABLE = 0.95
# What settings cost in time beside the cheapest, roughly: by the compiler's cycles for recomputed layers (Qwen3-1.7B on
# v6e), by what has to be gathered or summed among devices for the axes of the mesh.
_REMAT = {"full": 1.2}
_FSDP, _TENSOR = 1.05, 1.15
# What each further microbatch adds, which reads the weights once more.
_MICRO_BATCH = 0.05
_MOST_TENSOR = 8


def estimate(work: Work, config: Config, mesh: Mesh | AbstractMesh, where: Topology) -> MemoryEstimate:
    """What training takes on each device of a topology by these settings, in its largest shape."""
    shapes = work.shapes(row_multiple(config, mesh))
    rows, length, _, _ = max(shapes, key=lambda shape: shape[0] * shape[1])
    options = model_options(config.model, mesh)
    left_open = {"lora": options["lora"], "platform": "tpu" if where.libtpu else "gpu"}
    parts = config.train.grad_accum_steps or micro_batches(work.model, Batch(rows, length), mesh, **left_open)
    return estimate_memory(work.model, batch=Batch(-(-rows // parts), length), **options)


def abstract_mesh(config: Config, topology: Topology) -> AbstractMesh:
    """The mesh of a configuration over devices that need not be there.

    Raises:
      UserError: its sizes do not multiply to the number of devices.
    """
    mesh = config.mesh
    return AbstractMesh(mesh_sizes(mesh.data, mesh.fsdp, mesh.tensor, count=topology.devices), AXES)


def candidates(work: Work, config: Config, topology: Topology) -> Iterator[tuple[Config, MemoryEstimate]]:
    """The configuration with other settings that fit by the estimate; those that should cost the least time first."""
    tried = []
    for sizes in _meshes(topology.devices, work.model.num_heads):
        for remat, parts in itertools.product(REMAT, _divisors(config.train.batch_size)):
            changed = with_settings(config, sizes, remat, parts)
            multiple = row_multiple(changed, AbstractMesh(sizes, AXES))
            padded = math.ceil(config.train.batch_size / multiple) * multiple / config.train.batch_size
            _, fsdp, tensor = sizes
            cost = padded * _REMAT.get(remat, 1.0) * (1 + _MICRO_BATCH * (parts - 1))
            cost *= (_FSDP if fsdp > 1 else 1) * _TENSOR ** math.log2(tensor)
            tried.append((cost, -sizes[0], REMAT.index(remat), sizes, changed))
    # Of equal costs the one that keeps the most copies and recomputes the least.
    tried.sort(key=lambda item: item[:3])
    for *_, sizes, changed in tried:
        mesh = AbstractMesh(sizes, AXES)
        if _without_activations(work, changed, mesh) > _USABLE * topology.memory:
            continue
        found = estimate(work, changed, mesh, topology)
        if found.total <= _USABLE * topology.memory:
            yield changed, found


def _without_activations(work: Work, config: Config, mesh: AbstractMesh) -> int:
    return estimate_memory(work.model, batch=None, **model_options(config.model, mesh)).total


def least_memory(work: Work, config: Config, topology: Topology) -> int:
    """Bytes per device before any activation, with the weights cut over all devices."""
    return _without_activations(work, config, AbstractMesh((1, topology.devices, 1), AXES))


def with_settings(config: Config, sizes: tuple[int, int, int], remat: str, micro_batches: int) -> Config:
    """The configuration with another mesh, recomputation and number of microbatches."""
    data, fsdp, tensor = sizes
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor),
        model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, grad_accum_steps=micro_batches),
    )


def _meshes(devices: int, heads: int) -> Iterator[tuple[int, int, int]]:
    for tensor in _divisors(math.gcd(devices, heads)):
        if tensor <= _MOST_TENSOR:
            for fsdp in _divisors(devices // tensor):
                yield devices // tensor // fsdp, fsdp, tensor


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
