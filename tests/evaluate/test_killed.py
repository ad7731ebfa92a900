"""Real processes: evaluations killed by the system in every suite, and one spread over two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "eval" / "all.py"
FILES = ("summary.json", "per_prompt.csv", "samples.jsonl.gz")
# Stores of the suites, in the order in which they are filled.
STORES = (
    "structured/per_prompt.jsonl",
    "open_random/per_prompt.jsonl",
    "mcq/per_prompt.jsonl",
    "noveltybench/generate.jsonl",
    "noveltybench/partition.jsonl",
    "noveltybench/score.jsonl",
    "perplexity/per_prompt.jsonl",
    "retention/per_prompt.jsonl",
)
SUITES = tuple(dict.fromkeys(store.partition("/")[0] for store in STORES))
LITTLE = (
    "model.dtype=float32",
    "model.local_files_only=True",
    # Two seeds are two parts of the multiple-choice suite, which is killed between them.
    "eval.seeds=11,12",
    "eval.max_prompts_per_split=2",
    "eval.num_samples=4",
    "eval.max_new_tokens=4",
    "data.max_bins=31",
    "data.train_families=binomial",
    "data.heldout_families=poisson",
    "suite.open_random.num_samples=4",
    "suite.open_random.max_new_tokens=4",
    "suite.mcq.max_new_tokens=4",
    "suite.noveltybench.num_samples=4",
    # Answers of several words, which the classifier is asked about.
    "suite.noveltybench.max_new_tokens=120",
    "suite.noveltybench.reward_dtype=float32",
    "suite.noveltybench.threshold=0.002",
    "suite.perplexity.context_length=32",
    "suite.perplexity.stride=16",
    "suite.retention.tasks=tiny_winogrande,tiny_gsm8k",
    "suite.retention.max_new_tokens=4",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluation(
    small_checkpoint,
    classifier,
    reward_model,
    novelty_prompts,
    paloma,
    tiny_benchmarks,
    program_cache,
    tmp_path_factory,
):
    """Starts an evaluation into a directory; with `dies`, one that is killed when a store has so many records."""
    home = tmp_path_factory.mktemp("home")
    given = (
        *LITTLE,
        f"model.checkpoint={small_checkpoint}",
        f"data.cache_dir={home}",
        f"suite.noveltybench.data={novelty_prompts}",
        f"suite.noveltybench.classifier={classifier}",
        f"suite.noveltybench.reward_model={reward_model}",
        f"suite.perplexity.data={paloma}",
        f"suite.retention.data={tiny_benchmarks}",
    )

    def start(workdir, *overrides, dies=(), devices=1, **environment):
        program = [str(HERE / "evaluate_and_die.py"), *map(str, dies)] if dies else ["-m", "cft_jax.evaluate"]
        flags = [f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{one}" for one in (*given, *overrides))]
        paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, *program, *flags],
            env=os.environ
            | {
                "PYTHONPATH": paths,
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
                "XDG_CACHE_HOME": str(home),
                "JAX_COMPILATION_CACHE_DIR": str(program_cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def end(process, code=0):
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == code, errors


def contents(workdir):
    return {f"{suite}/{name}": (workdir / suite / name).read_bytes() for suite in SUITES for name in FILES} | {
        "summary.json": (workdir / "summary.json").read_bytes()
    }


def test_killed_in_every_suite(evaluation, tmp_path):
    end(evaluation(tmp_path / "whole"))
    killed = tmp_path / "killed"
    for store in STORES:
        end(evaluation(killed, dies=(store, 1)), code=-signal.SIGKILL)
        # Killed where it should be: the store has a record and half a line.
        left = (killed / store).read_bytes().splitlines(keepends=True)
        assert len(left) == 2 and not left[-1].endswith(b"\n"), store
        assert not (killed / "summary.json").exists()
    end(evaluation(killed))
    whole = contents(tmp_path / "whole")
    assert all("figures" in found for found in json.loads(whole["summary.json"])["suites"].values())
    for name, content in contents(killed).items():
        assert content == whole[name], name


def test_two_processes_evaluate_as_one(evaluation, tmp_path):
    """Each with a disk of its own; killed, they go on from what process 0 kept."""
    few = ("eval.suites=mcq,noveltybench,perplexity", "mesh.data=2")
    end(evaluation(tmp_path / "one", *few, devices=2))

    def start_two(**options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        return [
            evaluation(tmp_path / f"two{index}", *few, **names, JAX_PROCESS_ID=str(index), **options)
            for index in range(2)
        ]

    first, second = start_two(dies=("mcq/per_prompt.jsonl", 1))
    first.communicate(timeout=600)
    second.kill()
    second.communicate()
    for process in start_two():
        end(process)
    assert not (tmp_path / "two1").exists(), "process 0 alone writes"
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["suites"] for name in ("one", "two0"))
    assert one["mcq"] == two["mcq"]
    assert two["perplexity"]["figures"] == pytest.approx(one["perplexity"]["figures"], rel=1e-5)
    # What the scorers would find is left for a process alone.
    assert "stages=partition,score" in two["noveltybench"]["incomplete"]
    generated = [(tmp_path / name / "noveltybench/samples.jsonl.gz").exists() for name in ("one", "two0")]
    assert generated == [True, True]
