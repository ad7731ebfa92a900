"""How far a model is from its base: values and gradients equal to full log-softmaxes, blocked, masked, sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.objectives.base_loss import Base, base_divergences
from cft_jax.objectives.head import HeadOptions, Targets
from cft_jax.sharding.mesh import make_mesh
from cft_jax.sharding.rules import sharding

B, P, D, V = 4, 3, 16, 4201
OPTIONS = HeadOptions(tau=1.0, softcap=None, entropy=False, mesh=None)


def make_case(distance=1.0):
    """Hidden states and heads of a model and of a base so far away; of every position some tokens are left out."""
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((B, P, D), (V, D)))
    moved = [x + np.float32(distance) * rng.normal(size=x.shape).astype(np.float32) for x in (hidden, kernel)]
    ids = np.stack([rng.choice(V, P * 5, replace=False) for _ in range(B)]).astype(np.int32)
    probs = np.where(rng.random((B, P * 5)) < 0.8, 0.2, 0).astype(np.float32)
    position = np.repeat(np.arange(P, dtype=np.int32), 5)[None].repeat(B, 0)
    return hidden, kernel, Base(*map(jnp.asarray, moved)), Targets(*map(jnp.asarray, (position, ids, probs)))


def reference(hidden, kernel, base, options, without):
    """KL(base ‖ model) with whole rows of logits, by JAX's own differentiation."""

    def log_probs(states, head):
        raw = jnp.einsum("bpd,vd->bpv", states, head, precision="highest")
        if options.softcap is not None:
            raw = options.softcap * jnp.tanh(raw / options.softcap)
        if without is not None:
            rows = jnp.arange(B)[:, None]
            left_out = jnp.zeros(raw.shape, bool).at[rows, without.position, without.ids].max(without.probs > 0)
            raw = jnp.where(left_out, -1e30, raw)
        return jax.nn.log_softmax(raw)

    q, p = log_probs(*base), log_probs(hidden, kernel)
    return jnp.sum(jnp.where(q > -1e20, jnp.exp(q) * (q - p), 0.0), axis=-1)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "off support"])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("max_scores", [10**9, 20_000], ids=["one block", "blocks"])
def test_value_and_gradients_equal_full_logits(max_scores, softcap, masked):
    hidden, kernel, base, targets = make_case()
    without = targets if masked else None
    options = dataclasses.replace(OPTIONS, softcap=softcap)
    weights = jnp.linspace(0.5, 2.0, B * P).reshape(B, P)

    def fused(hidden, kernel, base):
        losses = base_divergences(hidden, kernel, base, options, without=without, max_scores=max_scores)
        return jnp.sum(weights * losses), losses

    def full(hidden, kernel):
        losses = reference(hidden, kernel, base, options, without)
        return jnp.sum(weights * losses), losses

    ours = jax.jit(jax.grad(fused, argnums=(0, 1, 2), has_aux=True))
    (*gradients, of_base), losses = ours(hidden, kernel, base)
    expected_gradients, expected = jax.grad(full, argnums=(0, 1), has_aux=True)(hidden, kernel)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert not any(np.any(x) for x in of_base)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_base_itself_is_no_distance_away(dtype):
    hidden, kernel, *_ = make_case()
    states, head = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype)

    def total(states):
        return base_divergences(states, head, Base(jnp.asarray(hidden, dtype), head), OPTIONS, max_scores=20_000).sum()

    loss, gradient = jax.jit(jax.value_and_grad(total))(states)
    assert loss == 0 and not np.any(np.asarray(gradient, np.float32))


def test_small_distances_keep_their_digits():
    """Of order 1e-8 nats, where differences of logarithms of sums would leave none: against float64."""
    hidden, kernel, base, _ = make_case(distance=1e-5)
    base = base._replace(kernel=jnp.asarray(kernel))
    losses = base_divergences(jnp.asarray(hidden), jnp.asarray(kernel), base, OPTIONS)
    scores = [np.asarray(x, np.float64) @ kernel.astype(np.float64).T for x in (hidden, base.hidden)]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in scores)
    expected = np.sum(np.exp(q) * (q - p), axis=-1)
    assert expected.max() < 1e-7
    # Scores of order 10 are off by 1e-6 themselves, next to differences of 1e-4.
    np.testing.assert_allclose(losses, expected, rtol=0.1)


@pytest.mark.parametrize("shape", [(4, 1, 2), (1, 2, 4)])
def test_sharded_over_eight_devices(shape):
    hidden, kernel, base, targets = make_case()
    mesh = make_mesh(*shape)
    hidden, kernel = jnp.asarray(hidden), jnp.asarray(kernel[:4200])
    base = base._replace(kernel=base.kernel[:4200])
    targets = targets._replace(ids=targets.ids % 4200)

    def total(hidden, options):
        return base_divergences(hidden, kernel, base, options, without=targets, max_scores=20_000).sum()

    expected = jax.jit(jax.value_and_grad(total), static_argnums=1)(hidden, OPTIONS)
    placed = jax.device_put(hidden, sharding(hidden.shape, ("batch", None, None), mesh))
    got = jax.jit(jax.value_and_grad(total), static_argnums=1)(placed, dataclasses.replace(OPTIONS, mesh=mesh))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5 * np.abs(expected[1]).max())
