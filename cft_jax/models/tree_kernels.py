"""The TPU kernels of `cft_jax.models.tree_attention`: softmax attention over blocks of keys, forward and backward.

The softmax runs over blocks of keys (FlashAttention, arXiv 2205.14135): running maximum and sum in float32, products in
the operands' dtype with float32 sums. The backward pass computes the scores again from the log-sum-exp. A block of
keys that no query of a block sees is passed over.

One program takes a block of queries of one row, and the keys of all the row, for some key/value heads: all of them, as
far as they fit, where rows are short, so that a program's fixed cost is spread; one where rows are long.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from cft_jax.models.layers import matmul_precision

# Of logits that are not seen, and the maximum before any was seen: exp(_MASKED - _NOTHING) = 0, and all stays finite.
_MASKED, _NOTHING = -1e30, -5e29
_LANES = 128
# Bytes of VMEM that the blocks of one program may take, and that the compiler may use for all of it.
_BLOCK_BYTES = 12 * 2**20
_VMEM_BYTES = 48 * 2**20


@dataclass(frozen=True)
class Rule:
    """How logits are made and seen, as in `cft_jax.models.attention.attend`.

    Attributes:
      scale: of the products of queries and keys.
      softcap: c in c*tanh(logit/c), or None.
      window: how many keys back a query sees, by position; None for all.
      block: queries that a program takes; it divides their number.
      interpret: run the kernels as ordinary operations, on any device.
    """

    scale: float
    softcap: float | None
    window: int | None
    block: int
    interpret: bool


class Segment(NamedTuple):
    """Keys and values in n blocks of b, and which queries may see them: those of index < `end`.

    Row r serves the queries' rows r*B/R ... (r+1)*B/R - 1.

    Attributes:
      keys: in the model's dtype.
      values: likewise.
      end: 0 for keys that none sees; one row for each of `keys`, or of the queries.
      positions: of the keys; None without a window.
      seen: 1 where any query of a block may see any key of a block; None where n = 1.
    """

    keys: Float[Array, "R K S H"]
    values: Float[Array, "R K S H"]
    end: Int[Array, "_ n 1 b"]
    positions: Int[Array, "R n 1 b"] | None
    seen: Int[Array, "B m n"] | None


class Inputs(NamedTuple):
    """What both passes read.

    Attributes:
      queries: rotated.
      segments: earlier ones, and last the queries' own row, of which query i sees key j only if j <= i.
      positions: of the queries; None without a window.
      sinks: one more logit per head, which takes mass and gives no value; or None.
    """

    queries: Float[Array, "B K G T H"]
    segments: tuple[Segment, ...]
    positions: Int[Array, "B T 1"] | None
    sinks: Float[Array, "K G"] | None


def forward(inputs: Inputs, rule: Rule) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
    """The weighted sums of values in the queries' dtype, 0 where a query sees nothing; and the float32 log-sum-exp."""
    layout = _Layout(inputs, rule)
    B, K, G, T, H = inputs.queries.shape
    out = jax.ShapeDtypeStruct((B, K, G, T, H), inputs.queries.dtype)
    state = tuple(pltpu.VMEM((G * rule.block, width), jnp.float32) for width in (1, 1, H))
    return pl.pallas_call(
        functools.partial(_forward_kernel, rule=rule, layout=layout),
        grid=layout.grid,
        in_specs=(layout.inputs(),),
        out_specs=(layout.queries, layout.statistics),
        out_shape=(out, jax.ShapeDtypeStruct((B, K, G, T), jnp.float32)),
        scratch_shapes=(state,),
        name="tree_attention",
        **layout.options(products=2, tensors=2),
    )(_flat(inputs))


def backward(
    inputs: Inputs,
    out: Float[Array, "B K G T H"],
    lse: Float[Array, "B K G T"],
    d_out: Float[Array, "B K G T H"],
    rule: Rule,
) -> tuple[Float[Array, "B K G T H"], tuple[tuple[Float[Array, "R K S H"], Float[Array, "R K S H"]], ...]]:
    """Gradients of the queries, and of each segment's keys and values, from `forward`'s results."""
    inputs = inputs._replace(sinks=None)
    layout = _Layout(inputs, rule)
    shapes = tuple(jax.ShapeDtypeStruct(s.keys.shape, s.keys.dtype) for s in inputs.segments)
    totals = tuple(pltpu.VMEM((layout.heads, *shape.shape[2:]), jnp.float32) for shape in shapes)
    d_queries = jax.ShapeDtypeStruct(inputs.queries.shape, inputs.queries.dtype)
    specs = layout.inputs()
    return pl.pallas_call(
        functools.partial(_backward_kernel, rule=rule, layout=layout),
        grid=layout.grid,
        in_specs=(specs, layout.queries, layout.statistics, layout.queries),
        out_specs=(layout.queries, tuple((s.keys, s.values) for s in specs.segments)),
        out_shape=(d_queries, tuple((shape, shape) for shape in shapes)),
        scratch_shapes=(
            tuple((total, total) for total in totals),
            (pltpu.VMEM((layout.group * rule.block, layout.width), jnp.float32),),
        ),
        name="tree_attention_backward",
        **layout.options(products=5, tensors=4),
    )(_flat(inputs), out, lse, d_out)


def _flat(inputs: Inputs) -> Inputs:
    """`seen` in one dimension: others would be padded in scalar memory."""
    flat = (s if s.seen is None else s._replace(seen=s.seen.reshape(-1)) for s in inputs.segments)
    return inputs._replace(segments=tuple(flat))


class _Layout:
    """Which blocks of the arrays a program takes: program (h, b, i) has some heads, one row, one block of queries."""

    def __init__(self, inputs: Inputs, rule: Rule) -> None:
        B, K, G, T, H = inputs.queries.shape
        self.shape, self.arrays, self.rule = (B, K, G, T, H), inputs, rule
        self.group, self.width, self.num_blocks = G, H, T // rule.block
        self.shares = tuple(B // segment.keys.shape[0] for segment in inputs.segments)
        one = self.num_blocks == 1 and all(segment.seen is None for segment in inputs.segments)
        self.heads = self._heads() if one else 1
        self.grid = (K // self.heads, B, self.num_blocks)
        self.queries = pl.BlockSpec((None, self.heads, G, rule.block, H), lambda h, b, i: (b, h, 0, i, 0))
        self.statistics = pl.BlockSpec((None, self.heads, G, rule.block), lambda h, b, i: (b, h, 0, i))

    def _heads(self) -> int:
        """The largest divisor of the key/value heads with which the backward pass's blocks fit."""
        _, K, G, _, H = self.shape
        width = pl.cdiv(H, _LANES) * _LANES
        keys = sum(segment.keys.shape[2] for segment in self.arrays.segments)
        # Two buffers of queries, outputs and their gradients, of keys, values and theirs; and the float32 sums.
        size = self.arrays.queries.dtype.itemsize
        per_head = width * (2 * 4 * size * (G * self.rule.block + keys) + 2 * 4 * keys)
        return max(
            heads for heads in range(1, K + 1) if K % heads == 0 and (heads == 1 or heads * per_head <= _BLOCK_BYTES)
        )

    def inputs(self) -> Inputs:
        segments = []
        for segment, share in zip(self.arrays.segments, self.shares, strict=True):
            keys = pl.BlockSpec(
                (None, self.heads, *segment.keys.shape[2:]), lambda h, b, i, share=share: (b // share, h, 0, 0)
            )
            row, end = (
                pl.BlockSpec((None, *segment.end.shape[1:]), lambda h, b, i, share=share: (b // share, 0, 0, 0))
                for share in (share, self.shape[0] // segment.end.shape[0])
            )
            scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
            positions, seen = segment.positions, segment.seen
            rows = None if positions is None else row
            segments.append(Segment._make((keys, keys, end, rows, None if seen is None else scalars)))
        positions = pl.BlockSpec((None, self.rule.block, 1), lambda h, b, i: (b, i, 0))
        positions = None if self.arrays.positions is None else positions
        sinks = None if self.arrays.sinks is None else pl.BlockSpec(memory_space=pltpu.SMEM)
        return Inputs._make((self.queries, tuple(segments), positions, sinks))

    def options(self, *, products: int, tensors: int) -> dict[str, Any]:
        """What the compiler is told: so many matrix products, and arrays as large as the queries and the keys."""
        B, K, G, T, H = self.shape
        segments = [segment.keys for segment in self.arrays.segments]
        # Of its own row a block of queries visits the blocks of keys up to its own.
        blocks = self.arrays.segments[-1].end.shape[1]
        keys = sum(x.shape[2] for x in segments) - segments[-1].shape[2] * (blocks - 1) // (2 * blocks)
        scores = B * K * G * T * keys
        size = self.arrays.queries.size + sum(x.size for x in segments)
        return {
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
            ),
            "cost_estimate": pl.CostEstimate(
                flops=2 * products * scores * H,
                transcendentals=scores,
                bytes_accessed=tensors * size * segments[-1].dtype.itemsize,
            ),
            "interpret": self.rule.interpret,
        }


def _forward_kernel(inputs: Any, out: Any, lse: Any, state: Any, *, rule: Rule, layout: _Layout) -> None:
    h, b, i = (pl.program_id(axis) for axis in range(3))
    biases = _biases(inputs, i, rule)
    for n in range(layout.heads):
        queries = inputs.queries[n].reshape(-1, layout.width)
        carry = _start(inputs.sinks, h * layout.heads + n, layout, rule)
        for segment, bias in zip(inputs.segments, biases, strict=True):

            def step(j: Any, carry: tuple[Array, Array, Array], segment=segment, bias=bias, n=n, queries=queries):
                top, total, weighted = carry
                keys, values = _block(segment.keys, n, j, segment), _block(segment.values, n, j, segment)
                scores = _scores(queries, keys, bias(j), rule)[0]
                higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
                shrink, probs = jnp.exp(top - higher), jnp.exp(scores - higher)
                total = total * shrink + jnp.sum(probs, axis=1, keepdims=True)
                return higher, total, weighted * shrink + _product(probs.astype(values.dtype), values, 1, 0)

            carry = _over_blocks(step, carry, segment, b * layout.num_blocks + i, state)
        top, total, weighted = carry
        total = jnp.where(total == 0, 1, total)
        out[n] = (weighted / total).reshape(out.shape[1:]).astype(out.dtype)
        column = top + jnp.log(total)
        for g in range(layout.group):
            lse[n, g] = column[g * rule.block : (g + 1) * rule.block, 0]


def _backward_kernel(
    inputs: Any,
    out: Any,
    lse: Any,
    d_out: Any,
    d_queries: Any,
    d_segments: Any,
    totals: Any,
    state: Any,
    *,
    rule: Rule,
    layout: _Layout,
) -> None:
    b, i = pl.program_id(1), pl.program_id(2)
    biases = _biases(inputs, i, rule)
    for share, sums in zip(layout.shares, totals, strict=True):

        @pl.when((b % share == 0) & (i == 0))
        def _(sums=sums):
            for total in sums:
                total[...] = jnp.zeros_like(total)

    for n in range(layout.heads):
        queries, grads = (ref[n].reshape(-1, layout.width) for ref in (inputs.queries, d_out))
        expected = out[n].reshape(-1, layout.width).astype(jnp.float32) * grads.astype(jnp.float32)
        expected = jnp.sum(expected, axis=1, keepdims=True)
        column = jnp.concatenate([jnp.expand_dims(lse[n, g], 1) for g in range(layout.group)])
        carry = (jnp.zeros(queries.shape, jnp.float32),)
        for segment, bias, sums in zip(inputs.segments, biases, totals, strict=True):

            def step(
                j: Any, carry: tuple[Array], segment=segment, bias=bias, sums=sums, n=n,
                queries=queries, grads=grads, expected=expected, column=column,
            ):  # fmt: skip
                keys, values = _block(segment.keys, n, j, segment), _block(segment.values, n, j, segment)
                scores, slope = _scores(queries, keys, bias(j), rule)
                probs = jnp.exp(scores - column)
                d_scores = probs * (_product(grads, values, 1, 1) - expected)
                d_scores = (d_scores if slope is None else d_scores * slope).astype(keys.dtype)
                _add(sums[0], n, j, segment, _product(d_scores, queries, 0, 0))
                _add(sums[1], n, j, segment, _product(probs.astype(grads.dtype), grads, 0, 0))
                return (carry[0] + _product(d_scores, keys, 1, 0),)

            carry = _over_blocks(step, carry, segment, b * layout.num_blocks + i, state)
        d_queries[n] = (carry[0] * rule.scale).reshape(d_queries.shape[1:]).astype(d_queries.dtype)

    for share, sums, refs in zip(layout.shares, totals, d_segments, strict=True):

        @pl.when((b % share == share - 1) & (i == layout.num_blocks - 1))
        def _(sums=sums, refs=refs):
            refs[0][...] = (sums[0][...] * rule.scale).astype(refs[0].dtype)
            refs[1][...] = sums[1][...].astype(refs[1].dtype)


def _start(sinks: Any, head: Any, layout: _Layout, rule: Rule) -> tuple[Array, Array, Array]:
    """Maximum, sum and weighted sum before any key: those of the sinks, where there are any."""
    rows = layout.group * rule.block
    weighted = jnp.zeros((rows, layout.width), jnp.float32)
    if sinks is None:
        return jnp.full((rows, 1), _NOTHING, jnp.float32), jnp.zeros((rows, 1), jnp.float32), weighted
    top = jnp.concatenate([jnp.full((rule.block, 1), sinks[head, g], jnp.float32) for g in range(layout.group)])
    return top, jnp.ones((rows, 1), jnp.float32), weighted


def _biases(inputs: Any, i: Any, rule: Rule) -> list[Callable[[Any], Array]]:
    """For each segment a function from the block of keys to what is added to its logits: 0 where seen, else _MASKED."""

    def biased(j: Any, segment: Any, causal: bool) -> Float[Array, "t b"]:
        size = segment.end.shape[2]
        query = i * rule.block + jax.lax.broadcasted_iota(jnp.int32, (rule.block, size), 0)
        visible = query < segment.end[j]
        if causal:
            visible &= j * size + jax.lax.broadcasted_iota(jnp.int32, (rule.block, size), 1) <= query
        if rule.window is not None:
            visible &= inputs.positions[...] - segment.positions[j] < rule.window
        return jnp.where(visible, 0.0, _MASKED)

    functions = []
    for segment in inputs.segments:
        of_block = functools.partial(biased, segment=segment, causal=segment is inputs.segments[-1])
        if segment.seen is None:
            # One block: the same for all heads.
            only = of_block(0)
            of_block = lambda j, only=only: only  # noqa: E731
        functions.append(of_block)
    return functions


def _scores(
    queries: Float[Array, "r H"], keys: Float[Array, "b H"], bias: Float[Array, "t b"], rule: Rule
) -> tuple[Float[Array, "r b"], Float[Array, "r b"] | None]:
    """Masked logits, and the soft-cap's slope."""
    scores, slope = _product(queries, keys, 1, 1) * rule.scale, None
    if rule.softcap is not None:
        bent = jnp.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * bent, 1 - bent * bent
    grouped = scores.reshape(-1, *bias.shape) + bias[None]
    return grouped.reshape(scores.shape), slope


def _over_blocks(
    step: Callable[[Any, Any], Any], carry: tuple[Array, ...], segment: Any, queries: Any, state: tuple[Any, ...]
) -> tuple[Array, ...]:
    """`step` over the blocks of keys that block `queries` (of all rows') may see; `state` keeps the carry between."""
    if segment.seen is None:
        return step(0, carry)
    count = segment.end.shape[0]
    for ref, value in zip(state, carry, strict=True):
        ref[...] = value

    def visit(j: Any, _: None) -> None:
        @pl.when(segment.seen[queries * count + j] != 0)
        def _():
            for ref, value in zip(state, step(j, tuple(ref[...] for ref in state)), strict=True):
                ref[...] = value

    jax.lax.fori_loop(0, count, visit, None)
    return tuple(ref[...] for ref in state)


def _slice(j: Any, segment: Any) -> Any:
    """Block j of a segment's keys."""
    size = segment.end.shape[2]
    return pl.ds(0 if segment.seen is None else pl.multiple_of(j * size, size), size)


def _block(ref: Any, n: int, j: Any, segment: Any) -> Float[Array, "b H"]:
    return ref[n, _slice(j, segment), :]


def _add(ref: Any, n: int, j: Any, segment: Any, value: Float[Array, "b H"]) -> None:
    ref[n, _slice(j, segment), :] += value


def _product(x: Array, y: Array, of_x: int, of_y: int) -> Float[Array, "_ _"]:
    """Matrix product over the named axes, with float32 sums."""
    dims = (((of_x,), (of_y,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
