"""One table from logical axes to mesh axes, for weights and activations alike."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
# Logical axes that no mesh axis cuts; a name in neither table is a mistake.
WHOLE = frozenset({"layers", "head_dim", "rank", "experts", "parts", "length", "act_embed"})


def num_shards(axis: str, mesh: Mesh | AbstractMesh | None) -> int:
    """Into how many parts a mesh cuts a logical axis; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in RULES[axis])


def partition_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry the given logical axes.

    A dimension that its mesh axes do not divide stays whole (one key/value head under tensor=2, say), so that every
    model runs on every mesh.

    Raises:
      ValueError: an axis name is unknown, or two dimensions would be cut along the same mesh axis.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    entries: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, axis in zip(shape, axes, strict=True):
        if axis is None or axis in WHOLE:
            entries.append(None)
            continue
        if axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join([*RULES, *sorted(WHOLE)])}")
        names, count = RULES[axis], num_shards(axis, mesh)
        if count == 1 or size % count:
            entries.append(None)
            continue
        if used & set(names):
            raise ValueError(f"axes {tuple(axes)} cut two dimensions along the same mesh axis")
        used |= set(names)
        entries.append(names)
    return PartitionSpec(*entries)


def sharding(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """`partition_spec` on a mesh."""
    return NamedSharding(mesh, partition_spec(shape, axes, mesh))


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """`x` with its sharding under jit fixed by its logical axes; without a mesh, `x` itself."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(x.shape, axes, mesh))
