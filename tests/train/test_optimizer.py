"""AdamW against torch, the schedule against transformers; both installed for the tests only."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from cft_jax.train.optimizer import adamw, warmup_cosine, warmup_steps


@pytest.mark.parametrize(("total", "ratio"), [(200, 0.03), (34, 0.03), (10, 0.0), (33, 0.03), (7, 0.5), (1, 0.9)])
def test_schedule_equals_transformers(total, ratio):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(ratio * total), total)
    for step in range(total):
        rate = warmup_cosine(jnp.int32(step), peak=2e-4, warmup_ratio=ratio, total_steps=total)
        np.testing.assert_allclose(rate, schedule.get_last_lr()[0], rtol=1e-5, atol=2e-4 * 1e-6)
        optimizer.step()
        schedule.step()


def test_first_update_has_rate_zero_only_with_a_warmup():
    # 3 % of 33 steps are no warm-up at all: int(0.99) = 0.
    assert warmup_steps(0.03, 33) == 0
    assert warmup_steps(0.03, 200) == 6
    assert warmup_cosine(0, peak=1.0, warmup_ratio=0.03, total_steps=33) == 1.0
    assert warmup_cosine(0, peak=1.0, warmup_ratio=0.03, total_steps=200) == 0.0


@pytest.mark.parametrize(("weight_decay", "max_grad_norm"), [(0.01, 0.0), (0.3, 0.0), (0.01, 1.5)])
def test_adamw_equals_torch(weight_decay, max_grad_norm):
    """Twelve steps of a varying rate on two matrices; float32 on both sides, so equal to rounding."""
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(5, 3)).astype(np.float32), "b": rng.normal(size=(4,)).astype(np.float32)}
    weights = {name: jnp.asarray(value) for name, value in start.items()}
    optimizer = adamw(weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    moments = optimizer.init(weights)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    their_optimizer = torch.optim.AdamW(theirs.values(), lr=1.0, weight_decay=weight_decay)
    for step in range(12):
        rate = 2e-2 * (step % 5)
        gradient = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()}
        updates, moments = optimizer.update({k: jnp.asarray(v) for k, v in gradient.items()}, moments, weights)
        weights = optax.apply_updates(weights, {name: -rate * update for name, update in updates.items()})
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
        their_optimizer.param_groups[0]["lr"] = rate
        their_optimizer.step()
    for name, parameter in theirs.items():
        # torch adds 1e-6 to the norm it divides by.
        np.testing.assert_allclose(weights[name], parameter.detach().numpy(), rtol=1e-5, atol=2e-6)
        assert np.abs(weights[name] - start[name]).max() > 0.01
