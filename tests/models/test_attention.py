"""`attend` against a plain loop in float64: masks, windows, segments, sinks and soft-caps."""

import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.models.attention import Segment, attend, tree_visible, within_window

B, T, N, K, H = 4, 7, 6, 3, 8
SCALE = 0.7
# Float32 softmax and sums of values up to 4, on any CPU: twenty units in the last place.
ROUNDING = 1e-5


def reference(q, keys, values, visible, *, softcap=None, sinks=None):
    """softmax(cap(scale * q·k)) v with one key list per row, all float64; the sink takes mass and gives nothing."""
    rows, length, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(rows):
        for t in range(length):
            for n in range(heads):
                k = n // (heads // keys.shape[2])
                scores = SCALE * keys[b, :, k] @ q[b, t, n]
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.where(visible[b, t], np.exp(scores), 0)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
                out[b, t, n] = weights @ values[b, :, k] / total
    return out


def draw(rng, *shape):
    return rng.normal(size=shape)


@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_equals_the_formula(softcap, with_sinks):
    rng = np.random.default_rng(0)
    q, k, v = draw(rng, B, T, N, H), draw(rng, B, T, K, H), draw(rng, B, T, K, H)
    sinks = draw(rng, N) if with_sinks else None
    visible = np.tril(np.ones((T, T), bool))[None].repeat(B, 0)
    got = attend(
        jnp.asarray(q, jnp.float32),
        (Segment(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32), jnp.asarray(visible)),),
        scale=SCALE,
        softcap=softcap,
        sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
    )
    np.testing.assert_allclose(got, reference(q, k, v, visible, softcap=softcap, sinks=sinks), atol=ROUNDING, rtol=0)


def test_a_shared_segment_serves_several_rows():
    """One prompt's keys for two rows each, and the rows' own keys: the same as both side by side."""
    rng = np.random.default_rng(1)
    q, k, v = draw(rng, B, T, N, H), draw(rng, B, T, K, H), draw(rng, B, T, K, H)
    shared_k, shared_v = draw(rng, B // 2, 5, K, H), draw(rng, B // 2, 5, K, H)
    seen = rng.random((B // 2, 1, 5)) < 0.6
    sinks = draw(rng, N)
    visible = np.tril(np.ones((T, T), bool))[None].repeat(B, 0)
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    got = attend(
        f32(q),
        (
            Segment(f32(shared_k), f32(shared_v), jnp.asarray(seen)),
            Segment(f32(k), f32(v), jnp.asarray(visible)),
        ),
        scale=SCALE,
        softcap=None,
        sinks=f32(sinks),
    )
    keys = np.concatenate([shared_k.repeat(2, 0), k], axis=1)
    values = np.concatenate([shared_v.repeat(2, 0), v], axis=1)
    both = np.concatenate([seen.repeat(2, 0).repeat(T, 1), visible], axis=2)
    np.testing.assert_allclose(got, reference(q, keys, values, both, sinks=sinks), atol=ROUNDING, rtol=0)


def test_a_row_that_sees_nothing_stays_finite():
    nothing = Segment(jnp.ones((1, T, K, H)), jnp.ones((1, T, K, H)), jnp.zeros((1, T, T), bool))
    got = attend(jnp.ones((1, T, N, H)), (nothing,), scale=SCALE, softcap=None, sinks=None)
    assert np.isfinite(got).all()


def test_visibility_of_a_tree():
    """By hand: prompt p, then the strings "ab" and "ac" and "d" below it; padding at the end.

    Row: p a b c d -, with subtree_end = end of what lies below: p 5, a 4, b 3, c 4, d 5, padding 0.
    """
    visible = np.asarray(tree_visible(jnp.array([[5, 4, 3, 4, 5, 0]])))[0].astype(int)
    expected = [
        [1, 0, 0, 0, 0, 0],  # p
        [1, 1, 0, 0, 0, 0],  # a
        [1, 1, 1, 0, 0, 0],  # b
        [1, 1, 0, 1, 0, 0],  # c does not see b
        [1, 0, 0, 0, 1, 0],  # d sees p alone
        [0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(visible, expected)


def test_windows_count_positions_not_places():
    """A window of 3 covers the query's own position and the two before it (transformers' sliding_window)."""
    positions = jnp.array([[4, 5, 6, 7]])
    earlier = jnp.array([[2, 3, 4]])
    near = np.asarray(within_window(3, positions, earlier))[0].astype(int)
    np.testing.assert_array_equal(near, [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert np.asarray(within_window(None, positions, earlier)).all()
