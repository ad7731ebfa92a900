"""Attention by TPU kernels: the same sums as `cft_jax.models.attention.attend`, and no score leaves the chip.

Here are the shapes that the kernels want, the mesh (each device runs them on its rows and heads) and the gradient.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from cft_jax.models.tree_kernels import Inputs, Rule, Segment, backward, forward
from cft_jax.sharding.rules import partition_spec

# Lengths are padded to a multiple: sublanes of a bfloat16 tile.
_TILE = 16
_LANES = 128
# `end` of keys that all queries may see.
EVERY = 2**30


class Keys(NamedTuple):
    """Keys and values of one segment; row r of R serves the queries' rows r*B/R ... (r+1)*B/R - 1.

    Queries of index < `end` may see a key: `subtree_end` of the queries' own tokens, EVERY or 0 of earlier ones, for
    each row of keys or, with B rows, for each row of queries.
    """

    keys: Float[Array, "R S K H"]
    values: Float[Array, "R S K H"]
    end: Int[Array, "_ S"]
    positions: Int[Array, "R S"]


def tree_attention(
    q: Float[Array, "B T N H"],
    segments: tuple[Keys, ...],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Float[Array, "N"] | None,
    mesh: Mesh | None,
    block: int = 512,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention of rotated queries over segments, of which the last is their own row (`j <= i < end[j]`).

    A query that sees nothing gets 0.

    Args:
      q: queries.
      segments: earlier ones and the own.
      positions: of the queries, for windows.
      scale: of the logits.
      softcap: c in c*tanh(logit/c).
      window: how many keys back a query sees, by position.
      sinks: one more logit per query head, which takes mass and gives no value.
      mesh: each device runs the kernel on its own rows and heads.
      block: longer rows are cut into blocks of so many keys, and of queries such that scores are as many squared.
      interpret: run the kernels as ordinary operations, on any device.
    """
    B, T, N, H = q.shape
    K = segments[-1].keys.shape[2]
    length = _padded(T, block)
    rule = Rule(scale, softcap, window, length if T <= block else _query_block(block, N // K), interpret)
    grouped = jnp.transpose(_pad(q, length).reshape(B, length, K, N // K, H), (0, 2, 3, 1, 4))
    at = _pad(positions, length)
    blocked = tuple(_blocked(keys, at, rule, block, own=keys is segments[-1]) for keys in segments)
    columns = None if window is None else at[:, :, None]
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(K, N // K)
    out: Array = _attention(rule, mesh, Inputs(grouped, blocked, columns, sinks))
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(B, length, N, H)[:, :T]


def _padded(length: int, block: int) -> int:
    unit = _TILE if length <= block else block
    return math.ceil(length / unit) * unit


def _query_block(block: int, group: int) -> int:
    """Queries whose scores with a block of keys are at most block x block, but no less than a row of lanes."""
    return max(min(block, _LANES), block // 2 ** math.ceil(math.log2(group)))


def _pad(x: Array, length: int) -> Array:
    """`x` with its second axis filled with 0."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _blocked(keys: Keys, query_positions: Int[Array, "B T"], rule: Rule, block: int, *, own: bool) -> Segment:
    """A segment as the kernels take it."""
    S, (B, T) = keys.end.shape[1], query_positions.shape
    length = _padded(S, block)
    size = min(length, block)
    count = length // size
    by_head, values = (jnp.transpose(_pad(x, length), (0, 2, 1, 3)) for x in (keys.keys, keys.values))
    end, positions = (_pad(x, length).reshape(-1, count, 1, size) for x in (keys.end, keys.positions))
    seen = None
    if count > 1:
        starts = jnp.arange(0, T, rule.block)[None, :, None]
        last = lambda x: jnp.repeat(jnp.max(x, axis=(2, 3)), B // x.shape[0], axis=0)[:, None, :]  # noqa: E731
        seen = last(end) > starts
        if own:
            seen &= jnp.arange(0, length, size)[None, None, :] < starts + rule.block
        if rule.window is not None:
            first = jnp.min(query_positions.reshape(B, -1, rule.block), axis=2)[:, :, None]
            seen &= first - last(positions) < rule.window
        seen = seen.astype(jnp.int32)
    return Segment(by_head, values, end, None if rule.window is None else positions, seen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(rule: Rule, mesh: Mesh | None, inputs: Inputs) -> Float[Array, "B K G T H"]:
    return _attention_forward(rule, mesh, inputs)[0]


def _attention_forward(rule: Rule, mesh: Mesh | None, inputs: Inputs) -> tuple[Array, tuple[Inputs, Array, Array]]:
    run = functools.partial(forward, rule=rule)
    if mesh is not None:
        specs = _specs(inputs, mesh)
        results = (specs.queries, PartitionSpec(*specs.queries[:4]))
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=results, check_vma=False)
    out, lse = run(inputs)
    return out, (inputs, out, lse)


def _attention_backward(
    rule: Rule, mesh: Mesh | None, residuals: tuple[Inputs, Array, Array], d_out: Float[Array, "B K G T H"]
) -> tuple[Inputs]:
    inputs, out, lse = residuals
    run = functools.partial(backward, rule=rule)
    if mesh is not None:
        specs = _specs(inputs, mesh)
        queries, segments = specs.queries, tuple((s.keys, s.values) for s in specs.segments)
        run = jax.shard_map(
            functools.partial(_summed_over_rows, run, specs),
            mesh=mesh,
            in_specs=(specs, queries, PartitionSpec(*queries[:4]), queries),
            out_specs=(queries, segments),
            check_vma=False,
        )
    d_queries, d_segments = run(inputs, out, lse, d_out)
    d_sinks = None
    if inputs.sinks is not None:
        # A sink's probability times what its value, 0, falls short of the output.
        products = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        d_sinks = -jnp.sum(jnp.exp(inputs.sinks[None, :, :, None] - lse) * products, axis=(0, 3))
    segments = tuple(Segment._make((keys, values, None, None, None)) for keys, values in d_segments)
    return (Inputs(d_queries, segments, None, d_sinks),)


_attention.defvjp(_attention_forward, _attention_backward)


def _summed_over_rows(run: Any, specs: Inputs, *arrays: Any) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
    """`backward` of one device; segments that serve the rows of all devices sum their gradients."""
    d_queries, d_segments = run(*arrays)
    rows = specs.queries[0]
    summed = (
        pair if rows == segment.keys[0] else jax.lax.psum(pair, rows)
        for pair, segment in zip(d_segments, specs.segments, strict=True)
    )
    return d_queries, tuple(summed)


def _specs(inputs: Inputs, mesh: Mesh) -> Inputs:
    """How a mesh cuts the arrays: along rows and key/value heads."""

    def spec(x: Array | None, *axes: str | None) -> Any:
        return None if x is None else partition_spec(x.shape, (*axes, *(None,) * (x.ndim - len(axes))), mesh)

    def of_segment(segment: Segment) -> Segment:
        rows = None if segment.keys.shape[0] == 1 else "batch"
        keys = spec(segment.keys, rows, "kv_heads")
        ends = None if segment.end.shape[0] == 1 else "batch"
        return Segment(keys, keys, spec(segment.end, ends), spec(segment.positions, rows), spec(segment.seen, "batch"))

    return Inputs(
        spec(inputs.queries, "batch", "kv_heads"),
        tuple(of_segment(segment) for segment in inputs.segments),
        spec(inputs.positions, "batch"),
        spec(inputs.sinks, "kv_heads"),
    )
