"""Tasks: what their digest holds."""

import dataclasses

import numpy as np
import pytest

from cft_jax.distributions import OutputSpace, PromptSpec, Task, task_from_spec
from cft_jax.distributions.tasks import digest_of_tasks

ASKED = ({"role": "user", "content": "Coin?"},)
COIN = Task("train", "custom", "custom_1", ASKED, space=OutputSpace(("h", "t"), np.array([1.0, 0.0])))
WAIT = task_from_spec(PromptSpec("train", "poisson", "poisson_2", {"lambda": 2.0}, "Wait."))


@pytest.mark.parametrize(
    "tasks",
    [
        [WAIT, COIN],
        [COIN],
        [COIN, dataclasses.replace(WAIT, weight=2.0)],
        [COIN, dataclasses.replace(WAIT, split="test_ood_family")],
        [COIN, dataclasses.replace(WAIT, messages=({"role": "user", "content": "Wait!"},))],
        [COIN, dataclasses.replace(WAIT, spec=dataclasses.replace(WAIT.spec, parameters={"lambda": 2.5}))],
        [COIN, dataclasses.replace(WAIT, spec=dataclasses.replace(WAIT.spec, family_id="exponential"))],
        [dataclasses.replace(COIN, space=OutputSpace(("h", "T"), np.array([1.0, 0.0]))), WAIT],
        [dataclasses.replace(COIN, space=OutputSpace(("h", "t"), np.array([0.9, 0.1]))), WAIT],
    ],
)
def test_every_edit_changes_the_digest(tasks):
    assert digest_of_tasks(tasks) != digest_of_tasks([COIN, WAIT])
    assert digest_of_tasks(tasks) == digest_of_tasks(list(tasks))
