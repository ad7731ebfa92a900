"""Masks from a hash: fair, independent, the same wherever a token stands, and the gradient's as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.models.dropout import Noise, dropout, keep_mask

RATE, TOKENS, COLUMNS = 0.05, 3000, 2048


def dropped(seed: int, token=None, columns=(COLUMNS,)) -> np.ndarray:
    token = jnp.arange(TOKENS) if token is None else token
    return ~np.asarray(keep_mask(jax.random.key_data(jax.random.key(seed)), token, columns, RATE))


@pytest.mark.parametrize("seed", [0, 1])
def test_masks_look_like_independent_draws(seed):
    mask = dropped(seed).astype(np.float64)
    count = mask.size
    # Five standard errors of so many draws.
    assert abs(mask.mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / count)
    # Means over columns and over tokens scatter as binomial ones do, whose variance is known to 1/sqrt(n/2).
    for axis, draws in ((0, TOKENS), (1, COLUMNS)):
        scatter = mask.mean(axis=axis).var() / (RATE * (1 - RATE) / draws)
        assert abs(scatter - 1) < 5 * np.sqrt(2 / mask.shape[1 - axis])
    # Neighbours, pairs of tokens and pairs of columns are dropped together as often as chance has it.
    for shifted in (np.roll(mask, 1, 0), np.roll(mask, 1, 1), np.roll(mask, 7, 0), np.roll(mask, 64, 1)):
        assert abs((mask * shifted).mean() - RATE**2) < 5 * RATE / np.sqrt(count)
    pairs = mask[:400] @ mask[:400].T / COLUMNS
    assert np.abs(pairs[~np.eye(400, dtype=bool)] - RATE**2).max() < 8 * RATE / np.sqrt(COLUMNS)


def test_other_keys_and_names_drop_others():
    alike = (dropped(0) & dropped(1)).mean()
    assert abs(alike - RATE**2) < 5 * RATE / np.sqrt(TOKENS * COLUMNS)
    noise = Noise(jax.random.key(0), jnp.arange(4)[None])
    x = jnp.ones((1, 4, COLUMNS))
    assert (dropout(x, noise.of("a"), 0.5) != dropout(x, noise.of("b"), 0.5)).mean() > 0.4


def test_a_token_drops_the_same_wherever_it_stands():
    token = jnp.array([[5, 9], [700, 5]])
    here, there = dropped(3, token), dropped(3)
    np.testing.assert_array_equal(here[0, 0], there[5])
    np.testing.assert_array_equal(here[1, 1], there[5])
    # Heads are columns like any others.
    np.testing.assert_array_equal(dropped(3, columns=(16, 128)).reshape(TOKENS, -1), there)


def test_the_gradient_is_dropped_alike():
    noise, x = Noise(jax.random.key(2), jnp.arange(6).reshape(2, 3)), jnp.full((2, 3, 64), 3.0)
    y, pull = jax.vjp(lambda x: dropout(x, noise, 0.3), x)
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], (y > 0).astype(jnp.float32))
