"""Orders of epochs and the endless list of draws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cft_jax.data.order import epoch_order, uniform_draws


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 10))
def test_every_round_visits_every_remaining_family_once(groups, visits, epoch):
    order = epoch_order(groups, visits, seed=11, epoch=epoch)
    assert np.bincount(order, minlength=len(groups)).tolist() == [visits] * len(groups)
    families = [groups[task] for task in order]
    left = {family: groups.count(family) * visits for family in set(groups)}
    while families:
        alive = {family for family, count in left.items() if count}
        this_round, families = families[: len(alive)], families[len(alive) :]
        assert set(this_round) == alive
        for family in alive:
            left[family] -= 1


def test_orders_differ_by_seed_and_epoch_alone():
    groups = ["a", "b"] * 20
    first = epoch_order(groups, 1, seed=1, epoch=0)
    assert np.array_equal(first, epoch_order(groups, 1, seed=1, epoch=0))
    assert not np.array_equal(first, epoch_order(groups, 1, seed=2, epoch=0))
    assert not np.array_equal(first, epoch_order(groups, 1, seed=1, epoch=1))


def test_items_and_rounds_are_shuffled_fairly():
    # Three tasks of one family and three of another: each of the six stands first equally often, 6,000 epochs of
    # probability 1/6, so that a count is within 5 standard deviations (144) of 1,000.
    firsts = [int(epoch_order(["a", "a", "a", "b", "b", "b"], 1, seed=0, epoch=epoch)[0]) for epoch in range(6000)]
    counts = np.bincount(firsts, minlength=6)
    assert (abs(counts - 1000) < 144).all()


@pytest.mark.parametrize("first", [0, 1, 3, 4, 5, 18, 99])
def test_draws_are_the_same_from_wherever_they_are_read(first):
    whole = uniform_draws(0, 120, seed=3, epoch=2)
    assert np.array_equal(uniform_draws(first, 20, seed=3, epoch=2), whole[first : first + 20])
    assert not np.array_equal(whole, uniform_draws(0, 120, seed=3, epoch=1))
    assert ((whole >= 0) & (whole < 1)).all()
