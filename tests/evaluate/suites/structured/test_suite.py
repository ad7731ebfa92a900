"""The structured suite on models known in closed form: exact metrics, samples, resuming, files."""

import csv
import dataclasses
import gzip
import json
import math

import numpy as np
import pytest

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.distributions import OutputSpace, PromptSpec, SpaceSettings, Task, build_splits, task_from_spec
from cft_jax.distributions.splits import OOD, TRAIN, UNSEEN
from cft_jax.evaluate import metrics
from cft_jax.evaluate.prompting import PromptStrategy
from cft_jax.evaluate.results import Results
from cft_jax.evaluate.ssot import extract_answer
from cft_jax.evaluate.suites.structured.plan import Resolution
from cft_jax.evaluate.suites.structured.settings import StructuredSettings, evaluation_tasks
from cft_jax.evaluate.suites.structured.suite import read_results, run_structured

SETTINGS = StructuredSettings(
    resolution=Resolution(SpaceSettings(num_decimals=1, max_bins=41), full_quantile=0.0, epsilon=1e-8),
    num_samples=200,
    seeds=(11,),
    max_new_tokens=8,
    temperature=1.0,
    top_p=1.0,
    numbers_per_completion=1,
)
FILES = ("summary.json", "per_prompt.csv", "samples.jsonl.gz", "per_prompt.jsonl")


@pytest.fixture(scope="module")
def tasks():
    splits = build_splits(
        train_families=("gaussian", "binomial"),
        heldout_families=("cauchy",),
        unseen="inside",
        grid_points=2,
        readable_parameters=True,
        max_prompts_per_split=3,
    )
    return [task_from_spec(spec) for split in ("test_unseen_params", "test_ood_family") for spec in splits[split]]


@pytest.fixture
def model_of(character_model, character_codec):
    """A model whose answers to every task follow its target, but for what `off` and `tilt` spoil."""

    def make(tasks, *, space=SETTINGS.resolution.grid, **faults):
        spaces = {tuple(character_codec.encode(task.messages)): task.output_space(space) for task in tasks}
        return character_model(spaces, **{"off": 0.0, "tilt": 0.0, **faults})

    return make


def run(model, codec, tasks, directory, settings=SETTINGS):
    return run_structured(model, codec, tasks, settings, Results(directory, "model", write=True))


def test_a_perfect_model(model_of, character_codec, tasks, tmp_path):
    summary = run(model_of(tasks), character_codec, tasks, tmp_path)
    assert set(summary["splits"]) == {"test_unseen_params", "test_ood_family"}
    for split in summary["splits"].values():
        exact = split["exact"]
        assert exact["kl"] == pytest.approx(0, abs=1e-6)
        assert exact["total_variation"] == pytest.approx(0, abs=1e-6)
        assert exact["support_mass"] == pytest.approx(1)
        assert exact["wasserstein_1"] == pytest.approx(0, abs=1e-4)
        assert split["path"]["logit_kl_as_trained"] == pytest.approx(0, abs=1e-5)
        assert split["sampled"]["valid_rate"] == 1
        assert split["calibration"]["model"] == pytest.approx(split["calibration"]["target"], abs=1e-5)


def test_a_faulty_model_by_hand(model_of, character_codec, tasks, tmp_path):
    summary = run(model_of(tasks, off=0.25), character_codec, tasks, tmp_path)
    for split in summary["splits"].values():
        # A quarter of the mass is off the support, the rest is the target: q = 3/4 p.
        assert split["exact"]["support_mass"] == pytest.approx(0.75, rel=1e-6)
        assert split["exact"]["total_variation"] == pytest.approx(0.25, rel=1e-5)
        assert split["exact"]["kl"] == pytest.approx(-math.log(0.75), rel=1e-5)
        assert split["exact"]["wasserstein_1"] == pytest.approx(0, abs=1e-4)
        low, high = split["intervals"]["valid_rate"]
        assert low <= split["sampled"]["valid_rate"] <= high
        assert split["sampled"]["valid_rate"] == pytest.approx(0.75, abs=0.06)
    assert summary["splits"]["test_unseen_params"]["num_families"] == 2


def test_path_kl_falls_on_the_faulty_step(model_of, character_codec, tmp_path):
    # One value of one character: two steps, the first has KL -ln(1 - off), the second none.
    task = Task("train", "custom", "one", ({"role": "user", "content": "q"},), space=OutputSpace(("7",), np.ones(1)))
    summary = run(model_of([task], off=0.5), character_codec, [task], tmp_path)
    expected = pytest.approx(math.log(2) / 2, rel=1e-6)
    assert summary["splits"]["train"]["path"] == {"logit_kl": expected, "logit_kl_as_trained": expected}


def test_summary_has_the_agreed_form(model_of, character_codec, tasks, tmp_path):
    run(model_of(tasks), character_codec, tasks, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["suite"] == "structured"
    assert summary["checkpoint"] == "model"
    split = summary["splits"]["test_unseen_params"]
    assert split["aggregation"] == "equal_family_weight"
    assert set(split["exact"]) == {"kl", "total_variation", "wasserstein_1", "support_mass"}
    assert "logit_kl" in split["path"]
    names = {"valid_rate", "support_violation_rate", "mean_error", "variance_error", "wasserstein_1", "num_samples"}
    assert set(split["sampled"]) == names
    assert split["sampled"]["num_samples"] == 200
    # The Cauchy has no moments: absent, and counted nowhere as zero.
    cauchy = summary["splits"]["test_ood_family"]["sampled"]
    assert set(cauchy) == names - {"mean_error", "variance_error"}


def test_files(model_of, character_codec, tasks, tmp_path):
    run(model_of(tasks), character_codec, tasks, tmp_path)
    rows = list(csv.DictReader((tmp_path / "per_prompt.csv").read_text().splitlines()))
    assert [(row["split"], row["task_id"]) for row in rows] == [(task.split, task.task_id) for task in tasks]
    assert float(rows[0]["exact.support_mass"]) == pytest.approx(1)
    with gzip.open(tmp_path / "samples.jsonl.gz", "rt") as file:
        samples = [json.loads(line) for line in file]
    assert [row["task_id"] for row in samples] == [task.task_id for task in tasks]
    values = [float(text) for text in samples[0]["samples"]]
    expected = metrics.moment_errors(values, tasks[0].spec)
    assert float(rows[0]["sampled.wasserstein_1"]) == pytest.approx(expected["wasserstein_1"])
    _, records = read_results(tmp_path)
    # One prompt per split and family is kept whole for the plots.
    kept = [(record["split"], record["group"]) for record in records if "distribution" in record]
    assert sorted(kept) == sorted({(task.split, task.group) for task in tasks})


def test_a_killed_run_continues_to_the_same_files(model_of, character_codec, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("cft_jax.evaluate.suites.structured.suite._PROMPTS_AT_ONCE", 2)
    run(model_of(tasks, tilt=0.01), character_codec, tasks, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(model_of(tasks, tilt=0.01, fail_after=2), character_codec, tasks, tmp_path / "killed")
    assert not (tmp_path / "killed/summary.json").exists()
    with (tmp_path / "killed/per_prompt.jsonl").open("a") as store:
        store.write('{"fingerprint": "torn')
    again = model_of(tasks, tilt=0.01)
    run(again, character_codec, tasks, tmp_path / "killed")
    # Two prompts were done; each two of the others take a call for the exact metrics and one for the paper's paths.
    assert again.calls == 2 * math.ceil((len(tasks) - 2) / 2)
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_other_weights_or_settings_are_measured_anew(model_of, character_codec, tasks, tmp_path):
    first = run(model_of(tasks), character_codec, tasks, tmp_path)
    faulty = run(model_of(tasks, off=0.5), character_codec, tasks, tmp_path)
    assert faulty["splits"]["test_ood_family"]["exact"]["support_mass"] == pytest.approx(0.5, rel=1e-6)
    assert first["fingerprint"] != faulty["fingerprint"]
    fewer = dataclasses.replace(SETTINGS, num_samples=20)
    assert run(model_of(tasks), character_codec, tasks, tmp_path, fewer)["fingerprint"] != first["fingerprint"]
    # Of the same name, as the rows of a file that has been edited.
    parameters = {name: value + 1 for name, value in tasks[0].spec.parameters.items()}
    edited = dataclasses.replace(tasks[0], spec=dataclasses.replace(tasks[0].spec, parameters=parameters))
    others = [edited, *tasks[1:]]
    assert run(model_of(others), character_codec, others, tmp_path)["fingerprint"] != first["fingerprint"]
    # The first weights' results are still there, and read with the summary although others were written after them.
    unchanged = model_of(tasks)
    run(unchanged, character_codec, tasks, tmp_path)
    assert unchanged.calls == 0
    summary, records = read_results(tmp_path)
    assert summary["fingerprint"] == first["fingerprint"] and len(records) == len(tasks)
    assert all(len(record["samples"]["11"]) == 200 for record in records)
    assert all(record["exact"]["support_mass"] == pytest.approx(1) for record in records)


def test_a_prompt_beyond_the_grid_lacks_the_papers_path_alone(character_model, character_codec, tmp_path):
    # The paper's grid ends at 1,000: it cannot list a Poisson distribution around 40,000.
    specs = [PromptSpec("train", "poisson", f"poisson_{mean}", {"lambda": mean}, f"mean {mean}") for mean in (4e4, 3.0)]
    tasks = [task_from_spec(spec) for spec in specs]
    resolution = Resolution(SpaceSettings(), full_quantile=1e-6, epsilon=1e-8)
    settings = dataclasses.replace(SETTINGS, resolution=resolution, num_samples=20)
    answers = {tuple(character_codec.encode(task.messages)): OutputSpace(("3", "4"), np.full(2, 0.5)) for task in tasks}
    model = character_model(answers, off=0.0, tilt=0.0)
    split = run(model, character_codec, tasks, tmp_path, settings)["splits"]["train"]
    assert split["num_prompts"] == 2 and split["sampled"]["valid_rate"] == 1
    assert split["left_out"]["path"] == {"logit_kl": 1}
    records = {record["task_id"]: record for record in read_results(tmp_path)[1]}
    assert set(records["poisson_3.0"]["path"]) == {"logit_kl", "logit_kl_as_trained"}
    assert set(records["poisson_40000.0"]["path"]) == {"logit_kl_as_trained"}


def test_categorical_task(model_of, character_codec, tmp_path):
    space = OutputSpace(("heads", "tails", "edge "), np.array([0.5, 0.4, 0.1]))
    task = Task("train", "custom", "coin", ({"role": "user", "content": "toss"},), space=space)
    split = run(model_of([task], off=0.2), character_codec, [task], tmp_path)["splits"]["train"]
    assert "wasserstein_1" not in split["exact"]
    assert split["exact"]["support_mass"] == pytest.approx(0.8, rel=1e-6)
    assert split["sampled"]["valid_rate"] == pytest.approx(0.8, abs=0.08)
    assert set(split["sampled"]) == {"valid_rate", "support_violation_rate", "num_samples"}
    assert split["tests"]["chi_square_pooled"]["num_prompts"] == 1


def test_listed_numbers(model_of, character_codec, tmp_path):
    space = OutputSpace(("10", "1", "100"), np.array([0.5, 0.25, 0.25]))
    task = Task("train", "custom", "prices", ({"role": "user", "content": "price"},), space=space)
    split = run(model_of([task]), character_codec, [task], tmp_path)["splits"]["train"]
    assert split["sampled"]["valid_rate"] == 1
    assert split["sampled"]["support_violation_rate"] == 0
    assert split["sampled"]["wasserstein_1"] < 3 * split["ideal"]["wasserstein_1_p95"]


def test_batch_protocol(character_model, character_codec, tasks, tmp_path):
    settings = dataclasses.replace(SETTINGS, numbers_per_completion=5, num_samples=100)
    task = tasks[0]
    prompt = task.messages[0]["content"].replace("exactly ONE random number", "exactly 5 random numbers")
    prompt = prompt.replace("Output ONLY the number.", "Output ONLY the numbers, separated by commas.")
    # Four numbers and a word, then five numbers and one too many.
    answers = OutputSpace(("1,2, 3,x,-1", "1,1,1,1,1,1"), np.array([0.5, 0.5]))
    model = character_model({tuple(map(ord, prompt)): answers}, off=0.0, tilt=0.0)
    settings = dataclasses.replace(settings, max_new_tokens=3)
    summary = run(model, character_codec, [task], tmp_path, settings)
    assert summary["protocol"] == "batch"
    split = summary["splits"][task.split]
    assert "exact" not in split and "path" not in split
    assert split["sampled"]["valid_rate"] == pytest.approx(0.9, abs=0.1)
    assert len(read_results(tmp_path)[1][0]["samples"]["11"]) == 20


def test_batch_protocol_needs_the_families_prompts(model_of, character_codec, tmp_path):
    task = Task("train", "custom", "one", ({"role": "user", "content": "q"},), space=OutputSpace(("7",), np.ones(1)))
    with pytest.raises(UserError, match="numbers_per_completion=1"):
        run(
            model_of([task]), character_codec, [task], tmp_path, dataclasses.replace(SETTINGS, numbers_per_completion=4)
        )


def test_string_seeds(character_model, character_codec, tasks, tmp_path):
    task = tasks[0]
    strategy = PromptStrategy(
        "ssot",
        lambda messages: [1, *character_codec.encode(messages)],
        lambda text: extract_answer(text, "none", strict=True),
        80,
        "ssot of characters",
    )
    prompt = tuple(strategy.encode(task.messages))
    texts = ("<random_string>7</random_string><answer>1.5</answer>", "7 <answer>1.5")
    model = character_model({prompt: OutputSpace(texts, np.array([0.75, 0.25]))}, off=0.0, tilt=0.0)
    results = Results(tmp_path, "model", write=True)
    summary = run_structured(model, character_codec, [task], SETTINGS, results, strategy)
    assert summary["protocol"] == "ssot"
    split = summary["splits"][task.split]
    assert "exact" not in split and "path" not in split
    assert split["sampled"]["valid_rate"] == pytest.approx(0.75, abs=0.1)
    without = split["lenient_parses"]["without_answer_tag"]
    assert without == round(200 * (1 - split["sampled"]["valid_rate"]))
    with gzip.open(tmp_path / "samples.jsonl.gz", "rt") as file:
        assert set(json.loads(file.readline())["samples"]) == set(texts)


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="no prompts"):
        evaluation_tasks(Config(), {split: [] for split in (TRAIN, UNSEEN, OOD)})


def test_several_seeds_are_averaged(model_of, character_codec, tasks, tmp_path):
    model, task = model_of(tasks, off=0.3), tasks[:1]
    rates, errors = [], []
    for seeds in ((11,), (12,), (11, 12)):
        settings = dataclasses.replace(SETTINGS, seeds=seeds)
        split = run(model, character_codec, task, tmp_path / str(seeds), settings)["splits"][task[0].split]
        rates.append(split["sampled"]["valid_rate"])
        low, high = split["intervals"]["valid_rate"]
        errors.append(high - low)
    assert rates[0] != rates[1]
    assert rates[2] == pytest.approx((rates[0] + rates[1]) / 2)
    assert errors[2] == pytest.approx(math.hypot(errors[0], errors[1]) / 2, rel=1e-6)
