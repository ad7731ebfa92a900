"""The main job end to end, on a model made on the spot: what it leaves behind, going on, interruptions, meshes."""

import csv
import gzip
import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cft_jax.common.writer import read_metrics
from cft_jax.jobs.calibrate import PREEMPTED, last_words
from cft_jax.main import run

TINY = Path(__file__).parent / "configs" / "tiny.py"
# The same model, trained alone and long enough to be interrupted.
LONG = ("train.epochs=150", "log.every_steps=5", "checkpoint.every_steps=4", "eval.enabled=False")
LONG_STEPS = 300
METRICS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "examples_per_second",
    "step_seconds",
    "padding_fraction",
}
pytestmark = pytest.mark.usefixtures("program_cache")


def contents(directory):
    """Every file with its bytes and its time of change."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def saved(workdir):
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_run):
    """The directory of a run of four steps out of six, and what `run` returned."""
    return tiny_run


def test_a_run_leaves_the_files_it_promises(finished):
    workdir, _ = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        *("base", "checkpoints", "config.json", "eval", "export", "metrics.jsonl", "report.html", "summary.json")
    }
    assert saved(workdir) == [3, 4]  # every three steps, and the last


def test_config_and_metrics(finished):
    workdir, _ = finished
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["train"]["max_steps"] == 4 and record["config"]["model"]["lora"]["rank"] == 16
    assert record["versions"]["jax"] and record["revision"] and "cpu" in record["devices"]
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert all(set(row) == METRICS for row in rows)
    # Eight prompts in batches of four: two steps an epoch.
    assert [row["epoch"] for row in rows] == [0.5, 1.0, 2.0]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("stage", ["before", "after"])
def test_evaluations(finished, stage):
    workdir, _ = finished
    directory = workdir / "eval" / "structured" / stage
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["suite"] == "structured"
    assert summary["checkpoint"] == (str(workdir / "base") if stage == "before" else f"{workdir}, step 4")
    assert set(summary["splits"]) == {"test_unseen_params", "test_ood_family"}
    for split in summary["splits"].values():
        assert split["num_prompts"] == 2 and split["aggregation"] == "equal_family_weight"
        assert "logit_kl" in split["path"]
        assert set(split["exact"]) >= {"kl", "total_variation", "wasserstein_1", "support_mass"}
        assert split["sampled"]["num_samples"] == 20 and 0 <= split["sampled"]["valid_rate"] <= 1
    with (directory / "per_prompt.csv").open(newline="") as file:
        assert [row["split"] for row in csv.DictReader(file)] == ["test_unseen_params"] * 2 + ["test_ood_family"] * 2
    with gzip.open(directory / "samples.jsonl.gz", "rt") as file:
        assert [len(json.loads(line)["samples"]) for line in file] == [20] * 4


def test_summary_holds_the_figures_of_both_stages(finished):
    workdir, returned = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    assert (summary["step"], summary["total_steps"], summary["skipped_steps"]) == (4, 6, 0)
    for stage, splits in summary["evaluations"]["structured"].items():
        path = workdir / "eval" / "structured" / stage / "summary.json"
        assert splits == json.loads(path.read_text())["splits"]
    before, after = (
        summary["evaluations"]["structured"][stage]["test_unseen_params"]["exact"]["kl"]
        for stage in ("before", "after")
    )
    assert after < before


def test_report_loads_nothing_from_elsewhere(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count("<svg") >= 3
    # Names of XML's vocabularies are the only addresses; nothing is fetched.
    assert {url.split("/")[2] for url in re.findall(r"https?://[^\"'\s<>)]+", page)} <= {"www.w3.org"}
    assert not re.search(r"<script[^>]+src=|<link\b|@import|<img[^>]+src=[\"'](?!data:)", page)


def test_export_is_what_transformers_loads(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = finished[0] / "export"
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "0.1"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith("0.1<|end|>")
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|end|>")]
    base, trained = (load_file(directory / "model.safetensors") for directory in (finished[0] / "base", export))
    assert base.keys() == trained.keys()
    assert all(not np.array_equal(base[name], trained[name]) for name in base)
    assert "## Metrics" in (export / "README.md").read_text()


def test_a_finished_run_does_nothing(finished, configured, capsys):
    workdir, returned = finished
    before = contents(workdir)
    assert run(configured(TINY, "train.max_steps=4"), workdir) == json.loads(json.dumps(returned))
    assert contents(workdir) == before
    said = capsys.readouterr().out
    assert said.startswith(f"{workdir} is finished (step 4)") and "another run" in said


def test_the_last_words_hold_the_metrics(finished):
    workdir, returned = finished
    lines = last_words(str(workdir), returned["evaluations"], exported=False).splitlines()
    assert any(line.split() == ["before", "->", "after"] for line in lines)
    splits = [returned["evaluations"]["structured"][stage]["test_ood_family"] for stage in ("before", "after")]
    before, after = (f"{split['exact']['total_variation']:.3f}" for split in splits)
    assert f"test_ood_family      total var.  {before} -> {after}" in lines
    assert lines[-1] == f"            python -m cft_jax.compare --output=FILE.html {workdir} [OTHER RUNS]"
    # A suite that could not run has no figures; what did run is shown all the same.
    missing = {stage: {"missing": "no weights"} for stage in ("before", "after")}
    assert "report  " in last_words(str(workdir), {"structured": missing}, exported=False)


@pytest.mark.slow
def test_more_steps_go_on(finished, configured, tmp_path):
    """Raising max_steps ends with the weights and figures of a run that was never stopped."""
    went_on, alone = tmp_path / "went-on", tmp_path / "alone"
    shutil.copytree(finished[0], went_on)
    before = contents(went_on)
    run(configured(TINY, "train.max_steps=0"), went_on)
    run(configured(TINY), alone)
    assert saved(went_on)[-1] == 6 and steps(went_on) == [1, 2, 4, 6]
    for name in ("export/model.safetensors", "eval/structured/after/per_prompt.csv"):
        assert (went_on / name).read_bytes() == (alone / name).read_bytes(), name
    after = contents(went_on)
    name = "eval/structured/before/per_prompt.jsonl"
    assert after[name][1] == before[name][1], "what was measured before training is not measured again"
    assert json.loads((went_on / "summary.json").read_text())["step"] == 6


def test_whole_tries_at_full_resolution(configured, tmp_path):
    overrides = ("train.objective=exact", "data.space=full", "train.max_steps=3", "eval.enabled=False")
    summary = run(configured(TINY, *overrides), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert summary["step"] == 3 and summary["evaluations"] == {}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "eval").exists()


class Long:
    """The command of a longer run on one device, in a process of its own, asked to be quiet."""

    def __init__(self, start, workdir, *overrides):
        self.start, self.workdir = start, workdir
        self.arguments = [f"--config={TINY}", f"--workdir={workdir}", "--quiet"]
        self.arguments += [f"--config.{override}" for override in (*LONG, *overrides)]

    def finish(self):
        process = self.start("main", *self.arguments)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        assert err == "", "nothing but the final summary was asked for"
        return out

    def interrupt(self, number, delay):
        """Sends a signal `delay` seconds after the run has come further than it was; returns the exit code."""
        process = self.start("main", *self.arguments)
        before = self.progress()
        while self.progress() <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=600)
        return process.returncode

    def interrupt_anywhere(self, number, delay):
        process = self.start("main", *self.arguments)
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=600)
        return process.returncode

    def progress(self):
        return max(saved(self.workdir), default=0)


@pytest.fixture(scope="module")
def undisturbed(start_command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    out = Long(start_command, workdir).finish()
    # Where everything is, and what to run next.
    titles = [line.split()[0] for line in out.splitlines() if line[:1].isalpha()]
    assert titles == ["report", "metrics", "weights", "next"]
    assert f"python -m cft_jax.export --workdir={workdir}" in out
    assert "\033" not in out, "colours are for terminals"
    return workdir


def assert_same_end(workdir, undisturbed, seed):
    for name in ("export/model.safetensors", "base/model.safetensors"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), (name, seed)
    assert steps(workdir) == steps(undisturbed) == [1, *range(5, LONG_STEPS + 1, 5)], seed
    assert not [path.name for path in workdir.iterdir() if path.name.startswith(".export")], seed


@pytest.mark.slow
def test_interrupted_runs_end_with_the_same_bits(start_command, undisturbed, tmp_path):
    seed = random.randrange(2**32)
    delays = random.Random(seed)
    job = Long(start_command, tmp_path / "run")
    assert job.interrupt(signal.SIGKILL, delays.uniform(0, 0.4)) == -signal.SIGKILL, seed
    assert job.interrupt(signal.SIGTERM, delays.uniform(0, 0.4)) == PREEMPTED == 143, seed
    saved_at = job.progress()
    assert 0 < saved_at < LONG_STEPS
    assert steps(job.workdir)[-1] <= saved_at, "the rows end where the state was saved"
    assert not (job.workdir / "summary.json").exists()
    job.finish()
    assert_same_end(job.workdir, undisturbed, seed)


@pytest.mark.slow
def test_twenty_interruptions_end_with_the_same_bits(start_command, undisturbed, tmp_path):
    seed = random.randrange(2**32)
    draws = random.Random(seed)
    job = Long(start_command, tmp_path / "run")
    codes = []
    for _ in range(20):
        number = draws.choice([signal.SIGKILL, signal.SIGTERM])
        # Half of them at any moment of the process: starting up, compiling, saving.
        if draws.random() < 0.5:
            codes.append(job.interrupt_anywhere(number, draws.uniform(1, 12)))
        else:
            codes.append(job.interrupt(number, draws.uniform(0, 0.1)))
    # SIGTERM before or after training ends the process at once; a run may be finished before the last signals.
    assert set(codes) <= {0, PREEMPTED, -signal.SIGTERM, -signal.SIGKILL}, (codes, seed)
    job.finish()
    assert_same_end(job.workdir, undisturbed, (codes, seed))


@pytest.mark.slow
def test_another_mesh_trains_alike(finished, configured, tmp_path):
    overrides = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.max_steps=2")
    run(configured(TINY, *overrides, "eval.enabled=False", "export.enabled=False"), tmp_path / "run")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    want = [row["loss"] for row in read_metrics(finished[0] / "metrics.jsonl")][:2]
    np.testing.assert_allclose(losses, want, rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_train_as_one(undisturbed, configured, tmp_path):
    overrides = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.max_steps=20", "export.enabled=False")
    run(configured(TINY, *LONG, *overrides), tmp_path / "run")
    want = {row["step"]: row["loss"] for row in read_metrics(undisturbed / "metrics.jsonl")}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20]
    for row in rows:
        np.testing.assert_allclose(row["loss"], want[row["step"]], rtol=1e-5)
