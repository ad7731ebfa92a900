"""The fused head: values and gradients equal to the plain losses, blocked or not, soft-capped, sharded, frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.objectives import hard_target_loss, soft_target_loss
from cft_jax.objectives.fused_loss import position_losses
from cft_jax.objectives.head import HeadOptions, Targets, num_blocks
from cft_jax.sharding.mesh import make_mesh
from cft_jax.sharding.rules import sharding

B, P, C, D, V = 8, 3, 5, 16, 4200
SOFT = HeadOptions(tau=1.0, softcap=None, entropy=True, mesh=None)


@dataclasses.dataclass(frozen=True)
class Case:
    """Random hidden states, head and targets, as `position_losses` takes them and padded per position."""

    hidden: jax.Array
    kernel: jax.Array
    position: jax.Array
    ids: jax.Array
    probs: jax.Array
    padded_ids: jax.Array
    padded_probs: jax.Array

    @property
    def targets(self):
        return Targets(self.position, self.ids, self.probs)


def make_case(seed=0, vocab=V):
    """Fan-outs of 1 to C; the last two entries of every row are padding."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, P, D)).astype(np.float32)
    kernel = rng.normal(size=(vocab, D)).astype(np.float32)
    padded_ids = np.stack([rng.choice(vocab, (P, C), replace=False) for _ in range(B)]).astype(np.int32)
    fan_out = rng.integers(1, C + 1, (B, P))
    mask = np.arange(C) < fan_out[..., None]
    padded_probs = np.where(mask, rng.random((B, P, C)) + 0.01, 0)
    padded_probs = (padded_probs / padded_probs.sum(-1, keepdims=True)).astype(np.float32)
    K = P * C + 2
    position, ids, probs = np.zeros((B, K), np.int32), np.zeros((B, K), np.int32), np.zeros((B, K), np.float32)
    for b in range(B):
        row = np.argwhere(mask[b])
        position[b, : len(row)] = row[:, 0]
        ids[b, : len(row)] = padded_ids[b][mask[b]]
        probs[b, : len(row)] = padded_probs[b][mask[b]]
    return Case(*(jnp.asarray(x) for x in (hidden, kernel, position, ids, probs, padded_ids, padded_probs)))


def reference(case, hidden, kernel, options):
    """Losses of the positions with full logits, by JAX's own differentiation."""
    raw = jnp.einsum("bpd,vd->bpv", hidden, kernel, precision="highest")
    if options.softcap is not None:
        raw = options.softcap * jnp.tanh(raw / options.softcap)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(raw / options.tau), case.padded_ids, axis=-1)
    q = case.padded_probs
    log_q = jnp.log(jnp.where(q > 0, q, 1)) if options.entropy else 0.0
    return jnp.sum(q * (log_q - log_probs), axis=-1)


def weighted(losses):
    """A scalar in which every position has a weight of its own."""
    return jnp.sum(losses * jnp.linspace(0.5, 2.0, B * P).reshape(B, P))


@pytest.mark.parametrize("max_scores", [10**9, 30_000, 1], ids=["plain", "some blocks", "most blocks"])
@pytest.mark.parametrize(
    "options",
    [
        SOFT,
        dataclasses.replace(SOFT, tau=0.7),
        dataclasses.replace(SOFT, softcap=2.5, tau=1.3),
        dataclasses.replace(SOFT, entropy=False),
    ],
    ids=["soft", "tau", "softcap", "hard"],
)
@pytest.mark.parametrize("vocab", [V, 4201], ids=["divisible", "prime"])
def test_value_and_gradients_equal_full_logits(max_scores, options, vocab):
    case = make_case(vocab=vocab)

    def fused(hidden, kernel):
        return weighted(position_losses(hidden, kernel, case.targets, options, max_scores=max_scores))

    def full(hidden, kernel):
        return weighted(reference(case, hidden, kernel, options))

    value, gradients = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))(case.hidden, case.kernel)
    expected, expected_gradients = jax.value_and_grad(full, argnums=(0, 1))(case.hidden, case.kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("max_scores", [10**9, 1])
def test_equals_the_public_soft_loss(max_scores):
    case = make_case()
    losses = position_losses(
        case.hidden, case.kernel, case.targets, dataclasses.replace(SOFT, tau=1.5), max_scores=max_scores
    )
    logits = np.einsum("bpd,vd->bpv", case.hidden, case.kernel)
    public = soft_target_loss(
        logits, case.padded_ids, case.padded_probs, case.padded_probs > 0, np.ones((B, P), bool), tau=1.5, epsilon=0.0
    )
    np.testing.assert_allclose(losses.mean(), public, rtol=1e-5)


@pytest.mark.parametrize("max_scores", [10**9, 1])
def test_equals_the_public_hard_loss(max_scores):
    case = make_case()
    labels = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, P)), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    options = dataclasses.replace(SOFT, entropy=False)
    losses = position_losses(
        case.hidden, case.kernel, Targets(position, labels, jnp.ones((B, P))), options, max_scores=max_scores
    )
    logits = np.einsum("bpd,vd->bpv", case.hidden, case.kernel)
    shifted = np.concatenate([logits, logits[:, :1]], axis=1)
    public = hard_target_loss(shifted, np.concatenate([labels[:, :1], labels], axis=1))
    np.testing.assert_allclose(losses.mean(), public, rtol=1e-5)


@pytest.mark.parametrize("max_scores", [10**9, 1])
def test_a_position_without_entries_is_nothing(max_scores):
    case = make_case()
    targets = case.targets._replace(probs=jnp.where(case.position == 1, 0, case.probs))

    def total(hidden):
        losses = position_losses(hidden, case.kernel, targets, SOFT, max_scores=max_scores)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(case.hidden)
    assert np.array_equal(losses[:, 1], np.zeros(B))
    np.testing.assert_allclose(gradient[:, 1], np.zeros((B, D)), atol=1e-7)


@pytest.mark.parametrize(("shape", "vocab"), [((8, 1, 1), V), ((2, 4, 1), V), ((1, 2, 4), V), ((2, 2, 2), 4202)])
def test_sharded_over_eight_devices(shape, vocab):
    """Batch over data and fsdp, the head over fsdp and tensor, as the rules have it; the same numbers to 1e-5.

    4202 = 2 · 11 · 191: no number of blocks that would do divides a shard, so they are padded.
    """
    case = make_case(vocab=vocab)
    mesh = make_mesh(*shape)
    options = dataclasses.replace(SOFT, mesh=mesh)

    def put(x, axes):
        return jax.device_put(x, sharding(x.shape, axes, mesh))

    hidden = put(case.hidden, ("batch", None, "act_embed"))
    kernel = put(case.kernel, ("vocab", "embed"))
    targets = Targets(*(put(x, ("batch", None)) for x in case.targets))

    def fused(hidden, kernel, targets):
        return weighted(position_losses(hidden, kernel, targets, options, max_scores=30_000))

    value, gradients = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))(hidden, kernel, targets)
    plain = jax.value_and_grad(lambda h, k: weighted(reference(case, h, k, SOFT)), argnums=(0, 1))
    expected, expected_gradients = plain(case.hidden, case.kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_bfloat16_operands_give_float32_losses():
    """Operands rounded to bfloat16, sums in float32: equal to float32 arithmetic on the rounded operands."""
    case = make_case()
    hidden, kernel = jnp.asarray(case.hidden, jnp.bfloat16), jnp.asarray(case.kernel, jnp.bfloat16)
    losses = position_losses(hidden, kernel, case.targets, SOFT, max_scores=1)
    assert losses.dtype == jnp.float32
    exact = reference(case, hidden.astype(jnp.float32), kernel.astype(jnp.float32), SOFT)
    np.testing.assert_allclose(losses, exact, rtol=1e-5)
    gradient = jax.grad(lambda h: weighted(position_losses(h, kernel, case.targets, SOFT, max_scores=1)))(hidden)
    want = jax.grad(lambda h: weighted(reference(case, h, kernel.astype(jnp.float32), SOFT)))(
        hidden.astype(jnp.float32)
    )
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(np.float32), want, atol=0.01 * np.abs(want).max())


def near_target(noise):
    """bfloat16 states and head, and targets that are the model's probabilities of 24 tokens times exp(noise · N(0, 1)).

    Rows of tokens of like meaning lie close together, as in trained models: they share a direction that the hidden
    states have too, so that these tokens hold all but 1e-8 of the probability.
    """
    rng = np.random.default_rng(5)
    rows, positions, fan_out, dim, vocab = 4, 3, 24, 64, 4096
    shared = rng.normal(size=dim) / np.sqrt(dim)
    kernel = rng.normal(size=(vocab, dim)) / np.sqrt(dim)
    answers = np.sort(np.concatenate([np.arange(40, 60), [1500, 1501, 4094, 4095]]))
    kernel[answers] += 2 * shared
    hidden = jnp.asarray(rng.normal(size=(rows, positions, dim)) + 16 * shared, jnp.bfloat16)
    kernel = jnp.asarray(kernel, jnp.bfloat16)
    wide_hidden, wide_kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    scores = wide_hidden @ wide_kernel.T
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    targets = probs[..., answers] * np.exp(noise * rng.normal(size=(rows, positions, fan_out)))
    targets = (targets / targets.sum(-1, keepdims=True)).astype(np.float32)
    error = probs.copy()
    error[..., answers] -= targets
    divergence = np.sum(targets * np.log(targets / probs[..., answers]), axis=-1).mean()
    entries = (
        np.repeat(np.arange(positions, dtype=np.int32), fan_out)[None].repeat(rows, 0),
        np.tile(answers.astype(np.int32), (rows, positions)),
        targets.reshape(rows, -1),
    )
    gradients = error @ wide_kernel, np.einsum("bpv,bpd->vd", error, wide_hidden)
    return divergence, hidden, kernel, Targets(*(jnp.asarray(x) for x in entries)), gradients


@pytest.mark.parametrize(
    ("noise", "divergence", "max_scores", "shape"),
    [
        (0.01, 5e-5, 10**9, None),
        (0.09, 4e-3, 1, None),
        (0.01, 5e-5, 1, None),
        (0.0028, 4e-6, 1, None),
        (0.01, 5e-5, 1, (2, 2, 2)),
    ],
    ids=["plain", "4e-3", "5e-5", "4e-6", "sharded"],
)
def test_bfloat16_gradients_hold_where_the_model_is_near_its_target(noise, divergence, max_scores, shape):
    """p and q agree to a few thousandths there: rounded before they are subtracted, nothing would be left of p - q.

    Reference: numpy, float64, on the same rounded operands. What stays is bfloat16's own rounding of the result,
    0.17 % of each number on average.
    """
    actual, hidden, kernel, targets, expected = near_target(noise)
    assert actual == pytest.approx(divergence, rel=0.25)
    options = SOFT
    if shape is not None:
        options = dataclasses.replace(SOFT, mesh=make_mesh(*shape))
        kernel = jax.device_put(kernel, sharding(kernel.shape, ("vocab", "embed"), options.mesh))

    @jax.jit
    def gradients(hidden, kernel, targets):
        return jax.grad(
            lambda *operands: position_losses(*operands, targets, options, max_scores=max_scores).sum(), argnums=(0, 1)
        )(hidden, kernel)

    for got, want in zip(gradients(hidden, kernel, targets), expected, strict=True):
        off = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert off < 0.01


def test_a_frozen_head_costs_no_gradient_of_its_own():
    """Scores and mean row, of the vocabulary and of the targets: four products; a trained kernel takes two more."""
    case = make_case()

    def fused(hidden, kernel):
        return weighted(position_losses(hidden, kernel, case.targets, SOFT, max_scores=1))

    def products(argnums):
        compiled = jax.jit(jax.value_and_grad(fused, argnums=argnums)).lower(case.hidden, case.kernel).compile()
        return compiled.as_text().count(" dot(")

    assert products(0) == 4
    assert products((0, 1)) == 6


@pytest.mark.parametrize(
    ("positions", "vocab", "shards", "expected"),
    [
        (10, 100, 1, 1),
        (288, 151_936, 1, 4),  # 44 M scores: 3 blocks would do, 4 divide 2^7 * 1187
        (2304, 151_936, 1, 32),  # 21 would do
        (2304, 128_256, 1, 24),  # 18 would do; 128256 = 2^8 * 3 * 167
        (2304, 128_256, 16, 24),  # 16 * 24 = 2^7 * 3
        (10**9, 4096, 1, 4),  # never narrower than 1024
        (2304, 151_939, 1, 21),  # a prime
    ],
)
def test_number_of_blocks(positions, vocab, shards, expected):
    assert num_blocks(positions, vocab, 1 << 24, shards) == expected
