"""The Python face: what it costs to import, asking a model, tasks from Python, training and measuring."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import cft_jax
from cft_jax.common.errors import UserError
from cft_jax.config import from_config_dict, read_config
from cft_jax.distributions import PromptSpec, output_space
from cft_jax.evaluate.metrics.sound import pooled_chi_square

pytestmark = pytest.mark.usefixtures("program_cache")
PROMPT = (
    "Generate exactly ONE random number from a Geometric distribution with parameters p=0.5. Output ONLY the number."
)
VALUES = ["1", "2", "3", "10"]
EVEN = cft_jax.Task("Heads or tails?", ["heads", "tails"], [0.5, 0.5])
# A model of seconds, and training of one step.
SMALL = {
    "model": {"scratch": {"num_layers": 1, "embed_dim": 32, "head_dim": 8, "hidden_dim": 48}},
    "train": {"objective": "exact", "max_steps": 1, "batch_size": 2},
}


@pytest.fixture(scope="module")
def model(tiny_run):
    return cft_jax.load(tiny_run[0])


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, cft_jax; assert 'Task' in dir(cft_jax); print(sorted({*sys.modules} & {'jax', 'numpy', 'flax'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="smaple"):
        _ = cft_jax.smaple


def test_distribution_is_that_of_the_draws(model):
    draws, exact = Counter(model.sample(PROMPT, 2000, seed=3)), model.distribution(PROMPT, VALUES)
    np.testing.assert_allclose(exact, np.exp(model.score(PROMPT, VALUES)), rtol=0)
    counts = np.array([draws[value] for value in VALUES] + [2000 - sum(draws[value] for value in VALUES)], float)
    _, pvalue, cells = pooled_chi_square(counts, np.append(exact, 1 - exact.sum()))
    assert cells >= 3 and pvalue > 1e-3
    once, again = model.score(PROMPT, ["2", "10", "2"])[[0, 2]]
    together = model.score_each(["Hi", PROMPT], [["1"], ["2"]])[1][0]
    assert once == again == pytest.approx(together, abs=1e-5)


@pytest.mark.slow
def test_seeds(model):
    messages = [{"role": "user", "content": PROMPT}]
    assert model.sample(PROMPT, 20, seed=1) == model.sample(messages, 20, seed=1) != model.sample(PROMPT, 20, seed=2)
    assert model.sample(PROMPT, 20) != model.sample(PROMPT, 20), "new draws each time"
    assert model.sample_each(["Hi", PROMPT], 20, seed=1)[1] == model.sample(PROMPT, 20, seed=1)


def test_settings_are_those_of_the_run_or_of_the_files(model, tiny_run):
    run = from_config_dict(read_config(tiny_run[0]))
    assert model.config.data == run.data and model.config.model.dtype == "float32"
    export = cft_jax.load(tiny_run[0] / "export", data={"num_decimals": 3})
    assert (export.config.model.dtype, export.config.data.num_decimals) == ("float32", 3)
    np.testing.assert_allclose(export.score(PROMPT, VALUES), model.score(PROMPT, VALUES), atol=1e-5)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda model: model.sample("3, " * 400, 1), "more than the 256 of the context"),
        (lambda model: model.distribution("Hi", ["1" * 300]), "more than the 256 of the context"),
        (lambda model: model.distribution("Hi", ["a", "b<|end|>"]), r"the value 'b<\|end\|>' becomes 'b'"),
        (lambda model: model.distribution("Hi", []), "at least one value"),
        (lambda model: model.sample("Hi", 0), "num_samples=0"),
        (lambda model: cft_jax.load("no-such-directory/at/all"), "no such directory"),
        (lambda model: cft_jax.load("no-such-directory/at/all", modle={}), "did you mean config.model"),
        (lambda model: cft_jax.evaluate(model, "mqc"), "mqc"),
    ],
)
def test_mistakes_are_told_in_one_line(model, ask, words):
    with pytest.raises(UserError, match=words) as told:
        ask(model)
    assert "\n" not in str(told.value)


def test_tasks_from_scipy_are_the_families_own():
    spec = PromptSpec("train", "exponential", "", {"lambda": 0.5}, "")
    task = cft_jax.Task.from_scipy("Wait.", stats.expon(scale=2), num_decimals=1, max_bins=50)
    space = output_space(spec, num_decimals=1, max_bins=50)
    assert task.values == space.values
    np.testing.assert_allclose(task.probabilities, space.probabilities, rtol=1e-12)
    assert cft_jax.Task.from_scipy("Roll.", stats.randint(1, 7)).row()["values"] == list("123456")
    with pytest.raises(UserError, match="frozen distribution"):
        cft_jax.Task.from_scipy("Wait.", stats.expon)
    with pytest.raises(UserError, match="frozen distribution"):
        cft_jax.Task.from_scipy("Wait.", stats.norm([0, 1]))


def test_tasks_from_counts():
    survey = pd.DataFrame({"answer": ["yes", "no", "yes", None], "rating": [5, 3, 5, 5]})
    task = cft_jax.Task.from_counts("Well?", survey["answer"].value_counts())
    assert dict(zip(task.values, task.probabilities, strict=True)) == {"yes": 2 / 3, "no": 1 / 3}
    assert cft_jax.Task.from_counts("Stars?", survey["rating"].value_counts()).prepared(1).space.values == ("5", "3")
    with pytest.raises(UserError, match="must be quoted"):
        cft_jax.Task.from_counts("How much?", {0.5: 3})
    with pytest.raises(UserError, match="nothing was counted"):
        cft_jax.Task.from_counts("How much?", {})
    with pytest.raises(UserError, match="they must sum to 1"):
        cft_jax.Task("Well?", ["a", "b"], [0.5, 0.4])


def test_results_on_a_store(model, bucket):
    measured = cft_jax.evaluate(model, "structured", workdir="gs://bucket/eval", eval={"num_samples": 0})
    assert json.loads((bucket / "eval" / "summary.json").read_text())["splits"].keys() == measured["splits"].keys()


def test_a_run_on_a_store_is_named_by_its_address(bucket, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps(EVEN.row()))
    (bucket / "run").mkdir()
    (bucket / "run" / "notes").write_text("mine")
    with pytest.raises(UserError, match="workdir=gs://bucket/run is not empty"):
        cft_jax.calibrate(None, tmp_path / "tasks.jsonl", workdir="gs://bucket/run", **SMALL)


def test_tasks_with_a_mistake_can_be_mended(tmp_path):
    for mistake in ({"train": {"epochs": 0}}, {"data": {"max_length": 8}}):
        with pytest.raises(UserError, match=r"epochs|max_length"):
            cft_jax.calibrate(None, [EVEN], workdir=tmp_path / "run", **(SMALL | mistake))
        assert not list(tmp_path.iterdir())


def test_calibrate_and_evaluate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A cast of the die that was rolled most.
    tasks = [EVEN, cft_jax.Task.from_counts("Roll a die.", Counter([1, 2, 3, 4, 5, 6, 6]))]
    quick = SMALL | {"eval": {"enabled": False}, "export": {"enabled": False}, "data": {"cache_dir": str(tmp_path)}}
    run = cft_jax.calibrate(None, tasks, **quick)
    assert run.summary["step"] == 1 and (run.workdir / "report.html").exists()
    rows = [json.loads(line) for line in (tmp_path / "runs" / "python.jsonl").read_text().splitlines()]
    assert rows == [task.row() for task in tasks]
    # Again, it is finished; other tasks are another run.
    assert cft_jax.calibrate(None, tasks, **quick).summary == run.summary
    with pytest.raises(UserError, match="holds the tasks of another run"):
        cft_jax.calibrate(None, [EVEN], **quick)
    model = run.load()
    measured = cft_jax.evaluate(model, "structured", eval={"num_samples": 3})
    spaces = [(task.prompt, task.prepared(1).space) for task in tasks]
    kl = [space.probabilities @ (np.log(space.probabilities) - model.score(p, space.values)) for p, space in spaces]
    assert measured["splits"]["train"]["exact"]["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert sorted(path.name for path in tmp_path.glob("runs/*")) == ["python", "python.jsonl"]
