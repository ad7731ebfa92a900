"""The two public losses against the paper's reference implementation (tests/golden/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.objectives import hard_target_loss, soft_target_loss


def soft_case(golden, index):
    """One golden case as the arguments of `soft_target_loss`, cut to its own vocabulary."""
    data = np.load(golden / "soft_loss.npz")
    vocab = int(data["vocab_size"][index])
    arguments = {
        "logits": data["logits"][index : index + 1, :, :vocab],
        "target_ids": data["child_ids"][index : index + 1],
        "target_probs": data["child_probs"][index : index + 1],
        "target_mask": data["child_mask"][index : index + 1],
        "step_mask": data["step_mask"][index : index + 1],
        "tau": float(data["tau"][index]),
        "epsilon": float(data["epsilon"][index]),
    }
    return arguments, float(data["loss_f64"][index])


def hard_case(golden, index):
    data = np.load(golden / "hard_loss.npz")
    rows, length, vocab = data["shape"][index]
    return data["logits"][index, :rows, :length, :vocab], data["labels"][index, :rows, :length], data["loss_f64"][index]


@pytest.mark.parametrize("index", range(24))
def test_soft_loss_equals_golden(golden, index):
    arguments, expected = soft_case(golden, index)
    np.testing.assert_allclose(soft_target_loss(**arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(8))
def test_hard_loss_equals_golden(golden, index):
    logits, labels, expected = hard_case(golden, index)
    np.testing.assert_allclose(jax.jit(hard_target_loss)(logits, labels), expected, rtol=1e-5, atol=1e-5)


def test_soft_loss_is_a_mean_of_rows_not_of_steps(golden):
    """Cases 0 and 3 share a vocabulary of 50; together they weigh equally though their numbers of steps differ."""
    first, loss_first = soft_case(golden, 0)
    second, loss_second = soft_case(golden, 3)
    assert first["step_mask"].sum() != second["step_mask"].sum() or loss_first != loss_second
    names = ("logits", "target_ids", "target_probs", "target_mask", "step_mask")
    both = {name: np.concatenate([first[name], second[name]]) for name in names}
    at_1 = [soft_target_loss(**{**case, "tau": 1.0, "epsilon": 1e-8}) for case in (first, second)]
    together = jax.jit(lambda case: soft_target_loss(**case, tau=1.0, epsilon=1e-8))(both)
    np.testing.assert_allclose(together, np.mean(at_1), rtol=1e-5)


def tiny_soft(**changes):
    """One row, two steps, vocabulary of three; by hand below."""
    case = {
        "logits": np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], np.float32)),
        "target_ids": np.array([[[0, 2], [1, 0]]], np.int32),
        "target_probs": np.array([[[0.5, 0.5], [1.0, 0.0]]], np.float32),
        "target_mask": np.array([[[True, True], [True, False]]]),
        "step_mask": np.array([[True, True]]),
    }
    return soft_target_loss(**{**case, **changes}, tau=1.0, epsilon=0.0)


def test_soft_loss_by_hand():
    # Step 1: 0.5 ln(0.5/0.5) + 0.5 ln(0.5/0.25) = 0.5 ln 2. Step 2: ln(1/0.2) = ln 5.
    np.testing.assert_allclose(tiny_soft(), (0.5 * np.log(2) + np.log(5)) / 2, rtol=1e-5)


def test_soft_loss_leaves_out_masked_and_targetless_steps():
    only_second = np.log(5)
    np.testing.assert_allclose(tiny_soft(step_mask=np.array([[False, True]])), only_second, rtol=1e-5)
    no_target = np.array([[[False, False], [True, False]]])
    np.testing.assert_allclose(tiny_soft(target_mask=no_target), only_second, rtol=1e-5)


def test_soft_loss_zero_target_under_zero_model_probability_counts_nothing():
    logits = np.array([[[0.0, -np.inf, 0.0], [0.1, 0.2, 0.7]]], np.float32)
    probs = np.array([[[1.0, 0.0], [1.0, 0.0]]], np.float32)
    ids = np.array([[[0, 1], [1, 0]]], np.int32)
    loss = tiny_soft(logits=logits, target_ids=ids, target_probs=probs, step_mask=np.array([[True, False]]))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)


def test_nothing_to_score_is_nan_with_finite_gradients():
    soft = jax.value_and_grad(lambda logits: tiny_soft(logits=logits, step_mask=np.zeros((1, 2), bool)))
    hard = jax.value_and_grad(lambda logits: hard_target_loss(logits, np.full((2, 4), -100)))
    for function, shape in ((soft, (1, 2, 3)), (hard, (2, 4, 5))):
        loss, gradient = function(jnp.ones(shape))
        assert np.isnan(loss)
        assert np.array_equal(gradient, np.zeros(shape))


def test_masked_steps_cannot_spoil_the_gradient():
    """NaN or infinite logits at padding must reach neither the loss nor the gradient of the real steps."""
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], np.float32))
    spoiled = logits.copy()
    spoiled[0, 0] = [np.inf, np.nan, 1.0]
    mask = np.array([[False, True]])
    clean = jax.value_and_grad(lambda z: tiny_soft(logits=z, step_mask=mask))(logits)
    loss, gradient = jax.value_and_grad(lambda z: tiny_soft(logits=z, step_mask=mask))(spoiled)
    np.testing.assert_array_equal(loss, clean[0])
    np.testing.assert_array_equal(gradient[0, 1], clean[1][0, 1])


def test_bfloat16_logits_are_scored_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3)) * 8, jnp.bfloat16)
    np.testing.assert_array_equal(tiny_soft(logits=logits), tiny_soft(logits=logits.astype(jnp.float32)))
    assert tiny_soft(logits=logits).dtype == jnp.float32
