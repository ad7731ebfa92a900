"""The TPU kernels of attention, run as ordinary operations, against the einsum form: sums and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.models.attention import Segment, attend, can_cut, tree_visible, within_window
from cft_jax.models.tree_attention import EVERY, Keys, tree_attention
from cft_jax.plan.topologies import compiler_devices, topology
from cft_jax.sharding.mesh import make_mesh
from cft_jax.sharding.rules import sharding

B, T, N, K, H = 4, 21, 6, 3, 8
SCALE = 0.7


def trees(rng, rows, length):
    """`subtree_end` of random trees in depth-first order, each with a few padding tokens at its end."""
    ends = np.zeros((rows, length), int)
    for row in ends:
        size = length - rng.integers(4)
        path = []
        for i in range(size):
            while path and rng.random() < 0.2:
                row[path.pop()] = i
            path.append(i)
        row[path] = size
    return jnp.asarray(ends, jnp.int32)


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def case(rng, length, shared_rows=None, shared=5):
    """Queries, keys and values of rows of trees, and of keys before them that `shared_rows` rows have in common."""
    ends = trees(rng, B, length)
    depth = jnp.sum(tree_visible(ends), axis=2) - 1
    positions = jnp.where(ends > 0, depth + shared, 0)
    segments = [Keys(draw(rng, B, length, K, H), draw(rng, B, length, K, H), ends, positions)]
    if shared_rows is not None:
        seen = jnp.asarray(rng.random((shared_rows, shared)) < 0.7)
        at = jnp.broadcast_to(jnp.arange(shared), seen.shape)
        tensors = (draw(rng, shared_rows, shared, K, H) for _ in range(2))
        segments.insert(0, Keys(*tensors, jnp.where(seen, EVERY, 0), at))
    return draw(rng, B, length, N, H), tuple(segments), positions


def by_einsum(q, segments, positions, *, window, scale, softcap, sinks):
    own = segments[-1]
    visible = [(keys.end > 0)[:, None] & within_window(window, positions, keys.positions) for keys in segments[:-1]]
    visible.append(tree_visible(own.end) & within_window(window, positions, own.positions))
    parts = (Segment(keys.keys, keys.values, seen) for keys, seen in zip(segments, visible, strict=True))
    return attend(q, tuple(parts), scale=scale, softcap=softcap, sinks=sinks)


def assert_equal(q, segments, positions, sinks, rng, mesh=None, block=512, **rule):
    """Sums of values within 1e-5 and gradients within 1e-4, where queries are real."""
    weights = draw(rng, *q.shape) * (segments[-1].end > 0)[:, :, None, None]
    rule = {"scale": SCALE, "softcap": None, "window": None, **rule}

    def run(attention, **options):
        def total(q, tensors, sinks):
            keys = tuple(s._replace(keys=k, values=v) for s, (k, v) in zip(segments, tensors, strict=True))
            out = attention(q, keys, positions, sinks=sinks, **rule, **options) * (weights != 0)
            return jnp.sum(out * weights), out

        tensors = tuple((s.keys, s.values) for s in segments)
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, tensors, sinks)

    (_, out), gradients = run(tree_attention, mesh=mesh, block=block, interpret=True)
    (_, expected_out), expected = run(by_einsum)
    np.testing.assert_allclose(out, expected_out, atol=1e-5, rtol=0)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("shared_rows", "rule"),
    [(None, {}), (2, {}), (1, {"softcap": 1.3, "window": 4})],
    ids=["alone", "prompts", "soft-cap and window"],
)
def test_trees_and_the_segments_before_them(shared_rows, rule):
    rng = np.random.default_rng(0)
    assert_equal(*case(rng, T, shared_rows), None, rng, **rule)


def test_rows_of_several_blocks_with_sinks():
    """Blocks of 16 keys and 8 queries, of which the kernels pass over those that nobody sees."""
    rng = np.random.default_rng(2)
    assert_equal(*case(rng, 3 * T, 1, shared=35), draw(rng, N), rng, window=9, block=16)


def test_each_device_takes_its_rows_and_heads():
    rng = np.random.default_rng(3)
    mesh = make_mesh(2, 1, 3, devices=jax.devices()[:6])
    assert_equal(*case(rng, T, 1), draw(rng, N), rng, mesh=mesh)


def test_what_a_mesh_cannot_cut():
    """Rows over 4 shards, key/value heads over 2: 3 heads stay whole, and so do 2 prompts of 8 rows."""
    mesh = make_mesh(2, 2, 2)
    assert can_cut(8, 2, (1, 4, 8), mesh) and can_cut(6, 2, (2,), mesh)
    assert not can_cut(8, 3, (1,), mesh)
    assert not can_cut(8, 2, (2,), mesh)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e-4", "v6e-4", "v5p-8"])
def test_tpu_compilers_take_the_kernels_without_gathering(name):
    """Short and long rows, over a mesh of rows and heads; only the gradient of what rows share is summed."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    mesh = make_mesh(2, 1, 2, devices=compiler_devices(topology(name)))

    def array(dtype, *shape_and_axes):
        shape, axes = zip(*shape_and_axes, strict=True)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(shape, axes, mesh))

    def arrays(length):
        q = array(jnp.bfloat16, (4, "batch"), (length, None), (8, "heads"), (64, None))
        k, shared = (
            array(jnp.bfloat16, row, (length, None), (2, "kv_heads"), (64, None)) for row in ((4, "batch"), (1, None))
        )
        ends, at = (array(jnp.int32, row, (length, None)) for row in ((4, "batch"), (1, None)))
        return q, (Keys(shared, shared, at, at), Keys(k, k, ends, ends)), ends

    def total(q, segments, positions, block):
        rule = {"scale": SCALE, "softcap": 1.3, "window": 9, "sinks": jnp.ones(8), "mesh": mesh}
        return jnp.sum(tree_attention(q, segments, positions, block=block, **rule).astype(jnp.float32) ** 2)

    def gradients(short, long):
        grad = jax.grad(total, argnums=(0, 1), allow_int=True)
        return grad(*short, block=512), grad(*long, block=128)

    text = jax.jit(gradients).trace(arrays(96), arrays(256)).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    assert "all-reduce" in text and "all-gather" not in text
