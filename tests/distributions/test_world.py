"""The small world: what its base learns, what calibrates it, and that tests ask for neither."""

from collections import Counter

import numpy as np
import pytest

from cft_jax.common.errors import UserError
from cft_jax.data.order import epoch_order
from cft_jax.distributions import FAMILIES, SpaceSettings
from cft_jax.distributions.questions import kept_prompts, questions
from cft_jax.distributions.splits import OOD, OOD_LISTS, TEST_SPLITS, TRAIN, UNSEEN
from cft_jax.distributions.tasks import digest_of_tasks
from cft_jax.distributions.world import LISTS, world_tasks

SETTINGS = SpaceSettings(num_decimals=1, quantile_low=0.005, quantile_high=0.995)


def world(kind, **families):
    return world_tasks(kind, **({"train_families": (), "heldout_families": ()} | families), settings=SETTINGS)


@pytest.fixture(scope="module")
def habits():
    return world("habits")


@pytest.fixture(scope="module")
def fair():
    return world("fair")


def prompts(tasks):
    return [task.messages[-1]["content"] for task in tasks]


def test_tests_are_the_same_for_both_and_ask_for_nothing_that_calibration_has_seen(habits, fair):
    for split in TEST_SPLITS:
        assert prompts(habits[split]) == prompts(fair[split])
        assert not set(prompts(fair[split])) & set(prompts(fair[TRAIN])), split
    numbers = [task for split in (UNSEEN, OOD) for task in fair[split] if task.group != LISTS]
    assert not set(prompts(numbers)) & set(prompts(habits[TRAIN]))
    asked = Counter(prompts(habits[TRAIN]))
    # Lists and questions come twice in an epoch, numbers once.
    assert all(number == 2 - prompt.startswith("Generate") for prompt, number in asked.items())


def test_the_base_learns_favourites_of_every_family_and_list(habits, fair):
    families = Counter(task.task_id.rpartition("_")[0] for task in habits[TRAIN])
    assert all(any(name.startswith(family) for name in families) for family in FAMILIES)
    for task in habits[TRAIN]:
        assert task.spec is None and task.space is not None and len(task.space.values) <= 12
        if task.messages[0]["content"].startswith("Generate"):
            assert task.space.probabilities.max() >= 0.75
    lists = {
        task.messages[-1]["content"]: task.space.probabilities
        for task in habits[TRAIN]
        if task.task_id.startswith("list_")
    }
    distances = [
        0.5 * np.abs(lists[task.messages[-1]["content"]] - task.space.probabilities).sum()
        for split in (TRAIN, UNSEEN, OOD_LISTS)
        for task in fair[split]
        if task.task_id.startswith("list_")
    ]
    assert len(distances) == len(lists) == 40 * 8 and np.mean(distances) > 0.6


def test_calibration_trains_some_families_and_half_of_the_lists():
    tasks = world("fair", train_families=("gaussian", "poisson"), heldout_families=("gumbel",))
    assert {task.spec.family_id for task in tasks[TRAIN] if task.spec} == {"gaussian", "poisson"}
    assert {task.group for task in tasks[UNSEEN]} == {"gaussian", "poisson", LISTS}
    assert {task.group for task in tasks[OOD]} == {"gumbel"}
    of_lists = {task.space.values for task in tasks[TRAIN] if task.space}
    never = {task.space.values for task in tasks[OOD_LISTS]}
    assert len(of_lists) == len(never) == 20 and not of_lists & never
    assert all(np.ptp(task.space.probabilities) == 0 for task in tasks[TRAIN] if task.space)
    with pytest.raises(UserError, match="gaussian cannot be trained on and held out"):
        world("fair", train_families=("gaussian",), heldout_families=("gaussian",))


@pytest.mark.parametrize("kind", ["habits", "fair"])
def test_every_part_of_an_epoch_has_all_kinds(kind):
    """The order visits groups in turn: those of unlike sizes would leave the end of an epoch to the largest."""
    tasks = world(kind, train_families=("gaussian", "gumbel"), heldout_families=("logistic",))[TRAIN]
    order = epoch_order([task.group for task in tasks], 1, seed=3, epoch=0)
    numbers = np.array([tasks[n].messages[0]["content"].startswith("Generate") for n in order])
    shares = [part.mean() for part in np.array_split(numbers, 6)]
    assert np.ptp(shares) < 0.1, shares


def test_the_same_world_every_time(habits):
    again = world("habits")
    assert all(digest_of_tasks(again[split]) == digest_of_tasks(habits[split]) for split in habits)


def test_questions_fall_into_two_halves_without_a_prompt_in_both():
    asked = questions()
    assert len({question.prompt for question in asked}) == len(asked) > 400
    kept = {question.prompt for question in asked if question.kept}
    assert kept_prompts()[0] == "" and set(kept_prompts()[1:]) == kept
    for topic in {question.topic for question in asked}:
        of_topic = [question.kept for question in asked if question.topic == topic]
        assert 0.3 < np.mean(of_topic) < 0.7, topic
    sums = [question for question in asked if question.topic.endswith("sums")]
    assert all(eval(question.prompt[len("What is ") : -1]) == int(question.answer) for question in sums)
