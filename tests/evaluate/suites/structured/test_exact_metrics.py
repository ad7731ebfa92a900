"""Metrics at full resolution, of part of the trie, against those over all strings listed."""

import numpy as np
import pytest

from cft_jax.distributions import OutputSpace, PromptSpec, SpaceSettings, task_from_spec
from cft_jax.distributions.analytic_space import analytic_space
from cft_jax.evaluate.suites.structured import plan as exact_plan
from cft_jax.evaluate.suites.structured.plan import AnalyticPlan, ListedPlan, Resolution, plan_of

RESOLUTION = Resolution(SpaceSettings(num_decimals=1), full_quantile=1e-4, epsilon=1e-8)
SPECS = {
    "gaussian": {"mu": 0.5, "sigma": 4.0},
    "exponential": {"lambda": 0.15},
    "binomial": {"n": 150.0, "p": 0.7},
}


@pytest.fixture(params=SPECS)
def case(request, character_model, character_codec):
    """A task, and a model that is off by a known amount, which knows every string."""
    task = task_from_spec(PromptSpec("train", request.param, request.param, SPECS[request.param], "ask"))
    full = analytic_space(task.spec, num_decimals=1, quantile=1e-4)
    integers = np.arange(full.first, full.last + 1)
    space = OutputSpace(tuple(full.strings(integers)), full.interval_masses(integers, integers + 1))
    prompt = tuple(character_codec.encode(task.messages))
    return task, character_model({prompt: space}, off=0.2, tilt=0.05), prompt


def sections(plan, case):
    _, model, prompt = case
    (score,) = model.score([prompt], [plan.trie], prefixes=None)
    return plan.sections(score, lambda tokens: "".join(map(chr, tokens)), keep_distribution=True)


@pytest.fixture
def listed(case, character_codec):
    plan = plan_of(case[0], character_codec, RESOLUTION, 11)
    assert isinstance(plan, ListedPlan)
    return sections(plan, case)


def test_the_whole_trie_gives_the_listed_metrics(case, listed, character_codec, monkeypatch):
    monkeypatch.setattr(exact_plan, "MAX_LISTED", 10)
    monkeypatch.setattr(exact_plan, "MAX_PREFIXES", 10**6)
    plan = plan_of(case[0], character_codec, RESOLUTION, 11)
    assert isinstance(plan, AnalyticPlan)
    got = sections(plan, case)
    assert got["exact"]["kl"] == pytest.approx(listed["exact"]["kl"], rel=1e-9)
    assert got["estimate"]["kl_standard_error"] == 0
    assert got["path"]["logit_kl_as_trained"] == pytest.approx(listed["path"]["logit_kl_as_trained"], rel=1e-6)
    for name, value in listed["exact"].items():
        assert got["exact_cells"][name] == pytest.approx(value, rel=1e-6), name
    for name, value in listed["exact_scaled"].items():
        assert got["exact_cells_scaled"][name] == pytest.approx(value, rel=1e-6)
    assert got["calibration"] == pytest.approx(listed["calibration"], rel=1e-3, abs=1e-5)


def test_part_of_the_trie_bounds_and_estimates(case, listed, character_codec, monkeypatch):
    monkeypatch.setattr(exact_plan, "MAX_LISTED", 10)
    monkeypatch.setattr(exact_plan, "MAX_PREFIXES", 25)
    monkeypatch.setattr(exact_plan, "DRAWN_STRINGS", 200)
    got = sections(plan_of(case[0], character_codec, RESOLUTION, 11), case)
    error = got["estimate"]["kl_standard_error"]
    assert got["exact"]["kl"] == pytest.approx(listed["exact"]["kl"], abs=4 * error + 1e-9)
    cells = got["exact_cells"]
    assert cells["kl"] <= listed["exact"]["kl"] + 1e-9
    assert cells["total_variation"] <= listed["exact"]["total_variation"] + 1e-9
    assert cells["support_mass"] >= listed["exact"]["support_mass"] - 1e-9
    # Where a cell is as wide as a bin of the plot, its mass may land in the neighbouring one.
    assert sum(got["distribution"]["target"]) == pytest.approx(1, abs=0.05)
    assert cells["wasserstein_1"] == pytest.approx(listed["exact"]["wasserstein_1"], rel=0.2)


def test_what_is_drawn_depends_on_seed_and_task_alone(case, character_codec, monkeypatch):
    monkeypatch.setattr(exact_plan, "MAX_LISTED", 10)
    monkeypatch.setattr(exact_plan, "MAX_PREFIXES", 25)
    tries = [plan_of(case[0], character_codec, RESOLUTION, seed).trie.token for seed in (11, 11, 12)]
    assert np.array_equal(tries[0], tries[1])
    assert not np.array_equal(tries[0], tries[2])
