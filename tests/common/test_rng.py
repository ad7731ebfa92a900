"""Keys by purpose and path."""

import itertools

import jax
import numpy as np
import pytest

from cft_jax.common.rng import fold_in, make_key


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_every_part_of_the_path_matters():
    parts = itertools.product((0, 1), ("dropout", "sample"), (0, 1), (0, 1))
    assert len({data(make_key(seed, purpose, first, second)) for seed, purpose, first, second in parts}) == 16


def test_the_path_is_a_chain_and_may_be_traced():
    whole = data(make_key(7, "sample", 3, 5))
    assert data(fold_in(make_key(7, "sample", 3), 5)) == whole
    assert data(jax.jit(lambda i: make_key(7, "sample", 3, i))(5)) == whole


def test_pinned():
    """A changed key would change every run's draws; recorded once from jax 0.10.2 (threefry is the same everywhere)."""
    assert data(make_key(11, "dropout", 2)) == (2431707369, 287033667)


def test_negative_seed():
    with pytest.raises(ValueError, match="seed=-1"):
        make_key(-1, "dropout")
