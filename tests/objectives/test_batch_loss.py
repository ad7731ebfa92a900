"""Sums and weights of a batch: equal to the public losses on the same strings, blind to padding, additive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.objectives import hard_target_loss, soft_target_loss
from cft_jax.objectives.batch_loss import DeviceBatch, batch_loss, head_options

B, T, P, C, D, V = 4, 9, 3, 2, 8, 31


def make_case(kind):
    """Rows of 1, 2, 3 and 0 steps; weights as the design has them: 1/steps for soft, 1 for hard."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel = rng.normal(size=(V, D)).astype(np.float32)
    counts = np.array([1, 2, 3, 0])
    mask = np.arange(P) < counts[:, None]
    index = np.where(mask, rng.integers(2, T, (B, 1)) - 2 + np.arange(P), 0).astype(np.int32)
    ids = rng.integers(0, V // 2, (B, P, C)).astype(np.int32)
    ids[..., 1] += V // 2
    probs = rng.random((B, P, C))
    if kind == "hard":
        probs[..., 0], probs[..., 1] = 1, 0
    probs = np.where(mask[..., None], probs / probs.sum(-1, keepdims=True), 0).astype(np.float32)
    weight = mask / np.maximum(counts, 1)[:, None] if kind == "soft" else mask
    row_weight = (counts > 0) if kind == "soft" else counts
    step = np.repeat(np.arange(P, dtype=np.int32), C)[None].repeat(B, 0)
    arrays = (index, weight.astype(np.float32), step, ids.reshape(B, -1), probs.reshape(B, -1))
    unread = [jnp.zeros((B, T), jnp.int32)] * 3
    batch = DeviceBatch(*unread, *map(jnp.asarray, arrays), jnp.asarray(row_weight, jnp.float32))
    return jnp.asarray(hidden), jnp.asarray(kernel), batch, ids, probs, mask


def test_soft_equals_the_public_loss():
    hidden, kernel, batch, ids, probs, mask = make_case("soft")
    total, weight = batch_loss(hidden, kernel, batch, head_options("soft", tau=0.8, softcap=None, mesh=None))
    logits = jnp.take_along_axis(hidden @ kernel.T, batch.target_index[..., None], axis=1)
    public = soft_target_loss(logits, ids, probs, probs > 0, mask, tau=0.8, epsilon=0.0)
    np.testing.assert_allclose(total / weight, public, rtol=1e-5)


def test_hard_equals_the_public_loss_and_ignores_tau():
    hidden, kernel, batch, ids, _, mask = make_case("hard")
    total, weight = batch_loss(hidden, kernel, batch, head_options("hard", tau=0.8, softcap=None, mesh=None))
    labels = np.full((B, T + 1), -100)
    for b, p in np.argwhere(mask):
        labels[b, batch.target_index[b, p] + 1] = ids[b, p, 0]
    logits = jnp.pad(hidden @ kernel.T, ((0, 0), (0, 1), (0, 0)))
    np.testing.assert_allclose(total / weight, hard_target_loss(logits, labels), rtol=1e-5)


def test_padding_reaches_neither_value_nor_gradient():
    """NaN in the row without steps, and at position 0 that padded steps point to."""
    hidden, kernel, batch, *_ = make_case("soft")
    spoiled = hidden.at[3].set(jnp.nan).at[:3, 0].set(jnp.nan)
    options = head_options("soft", tau=1.0, softcap=None, mesh=None)
    used = np.zeros((B, T), bool)
    for b, p in np.argwhere(np.asarray(batch.target_weight) > 0):
        used[b, batch.target_index[b, p]] = True
    assert not used[:, 0].any()

    def loss(hidden):
        return batch_loss(hidden, kernel, batch, options)[0]

    value, gradient = jax.value_and_grad(loss)(spoiled)
    expected, expected_gradient = jax.value_and_grad(loss)(hidden)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert np.array_equal(np.abs(gradient).sum(-1) > 0, used)


def test_halves_add_up():
    hidden, kernel, batch, *_ = make_case("soft")
    options = head_options("soft", tau=1.0, softcap=None, mesh=None)
    whole = batch_loss(hidden, kernel, batch, options)
    halves = [
        batch_loss(hidden[half], kernel, jax.tree.map(lambda x: x[half], batch), options)  # noqa: B023
        for half in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(whole, np.sum(halves, axis=0), rtol=1e-5)


def test_unknown_kind():
    with pytest.raises(ValueError, match="firm"):
        head_options("firm", tau=1.0, softcap=None, mesh=None)
