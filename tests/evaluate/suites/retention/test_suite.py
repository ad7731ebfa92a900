"""The retention suite on a small model and local data; its rules are tested against golden values elsewhere."""

import gzip
import json
import zlib
from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.config.suites import RETENTION_TASKS, RetentionConfig, SuiteConfig
from cft_jax.evaluate.__main__ import run
from cft_jax.evaluate.suites.retention import suite as retention
from cft_jax.evaluate.suites.retention.suite import PromptText
from cft_jax.text import ChatOptions
from cft_jax.text.scratch import save_tokenizer, train_tokenizer
from cft_jax.text.tokenizer import load_tokenizer

CONFIG = Path(__file__).parents[4] / "configs" / "eval" / "retention.py"


@pytest.fixture(scope="module")
def data(tiny_benchmarks):
    return tiny_benchmarks


@pytest.fixture(scope="module")
def tokenizer(golden_rows):
    return train_tokenizer([row["prompt"] for row in golden_rows("retention_examples")])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf, hf_config, tokenizer):
    directory = tmp_path_factory.mktemp("model")
    write_hf(directory, hf_config("qwen3", vocab_size=len(tokenizer)))
    save_tokenizer(tokenizer, directory)
    return directory


# Rows of RETENTION.md, section "Boundary cases": tokenizer, context, continuation, scored tokens, copies of the BOS.
@pytest.mark.parametrize(
    "name, context, continuation, scored, copies",
    [
        ("qwen3", "Answer:", " A", [362], 0),
        ("qwen3", "Answer: ", "A", [32], 0),
        ("qwen3", "x", "\nfoo", [7975], 0),
        ("llama3", "Answer:", " A", [362], 2),
        ("llama3", "Answer: ", "A", [32], 2),
        ("llama3", "x", "\nfoo", [8134], 2),
        ("gemma3", "Answer:", " A", [562], 2),
        ("gemma3", "x", "\nfoo", [26537], 2),
        ("gpt_oss", "Answer:", " A", [355], 0),
        ("gpt_oss", "x", "\nfoo", [198, 16660], 0),
    ],
)
def test_what_is_scored_at_the_seam(tokenizers_dir, name, context, continuation, scored, copies):
    tokenizer = load_tokenizer(str(tokenizers_dir / name), revision="main", local_files_only=True)
    before, after = PromptText(tokenizer, ChatOptions(), duplicate_bos=True).request(context, continuation)
    assert after == scored
    if copies:
        assert before.count(tokenizer.bos_token_id) == copies
        before, after = PromptText(tokenizer, ChatOptions(), duplicate_bos=False).request(context, continuation)
        assert after == scored and before.count(tokenizer.bos_token_id) == 1


def test_the_seam_without_a_template(tokenizers_dir):
    tokenizer = load_tokenizer(str(tokenizers_dir / "qwen3"), revision="main", local_files_only=True)
    tokenizer.chat_template = None
    prompts = PromptText(tokenizer, ChatOptions(), duplicate_bos=True)
    assert prompts.request("Answer: ", "the cat")[1] == [8251]
    with pytest.raises(UserError, match="is no token of its own"):
        prompts.request("Answer: ", "A")


@pytest.fixture
def hashing(scripted_model):
    """Makes a backend whose probabilities and texts are hashes of the tokens; it fails after so many calls."""

    def log_prob(request):
        return -(zlib.crc32(repr(request).encode()) % 9973) / 997

    def text(prompt):
        return f"so #### {zlib.crc32(repr(prompt).encode()) % 3 * 617}"

    return lambda fail_after=10**9: scripted_model(log_prob=log_prob, text=text, stop="</s>", fail_after=fail_after)


@pytest.fixture
def measure(run_suite, tokenizer, data):
    """Runs the suite into a directory on a backend, with changed settings."""

    def start(backend, directory, **changes):
        settings = RetentionConfig(**({"data": str(data)} | changes))
        return run_suite(retention.run, backend, tokenizer, directory, suite=SuiteConfig(retention=settings))

    return start


def test_a_killed_run_ends_with_the_same_files(hashing, measure, tmp_path):
    whole = hashing()
    summary = measure(whole, tmp_path / "whole")
    assert whole.calls == 25
    found = summary["tinybenchmarks"]
    assert set(found["tasks"]) == {*RETENTION_TASKS[:-1], "tiny_gsm8k_strict", "tiny_gsm8k_flexible"}
    assert found["aggregate"]["num_tasks"] == 6 and "mean_gpirt" not in found["aggregate"]
    assert found["tasks"]["tiny_truthfulqa"]["metric_name"] == "mc2"
    for calls in (0, 7, 24):
        with pytest.raises(KeyboardInterrupt):
            measure(hashing(calls), tmp_path / f"killed{calls}")
        rest = hashing()
        assert measure(rest, tmp_path / f"killed{calls}") == summary
        assert rest.calls == 25 - calls
    for name in ("summary.json", "per_prompt.csv", "samples.jsonl.gz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed7" / name).read_bytes()
    # Half of the questions asked together were written when the machine failed.
    store = tmp_path / "killed7" / "per_prompt.jsonl"
    store.write_text("".join(line + "\n" for line in store.read_text().splitlines()[:210]))
    assert measure(hashing(), tmp_path / "killed7") == summary


def test_estimates_come_with_item_parameters(hashing, measure, golden, tmp_path):
    # The golden arrays, with the order and the weights that stand in the JSON file.
    import numpy as np

    about = json.loads((golden / "retention_irt.json").read_text())["bundles"]
    arrays = dict(np.load(golden / "retention_irt.npz", allow_pickle=False))
    for name, bundle in about.items():
        arrays[f"{name}.scenarios"] = np.array([scenario["name"] for scenario in bundle["scenarios"]])
        arrays[f"{name}.lambdas"] = np.array([scenario["optimal_lambda"] for scenario in bundle["scenarios"]])
    np.savez(tmp_path / "items.npz", **arrays)
    options = {"tasks": ("tiny_mmlu", "tiny_gsm8k"), "item_parameters": str(tmp_path / "items.npz")}
    summary = measure(hashing(), tmp_path / "run", **options)["tinybenchmarks"]
    estimates = [row["gpirt"] for row in summary["tasks"].values()]
    assert len(estimates) == 3 and all(0 <= value <= 1 for value in estimates)
    assert summary["aggregate"]["mean_gpirt"] == pytest.approx(sum(estimates) / 3)


def test_missing_data_says_what_where_and_how(hashing, measure, tmp_path):
    def fails(pattern, **changes):
        with pytest.raises(UserError, match=pattern):
            measure(hashing(), tmp_path, **changes)

    fails(
        r"data='/no/where' holds neither tiny_mmlu\.jsonl nor tinyMMLU/; get it with `hf download "
        r"tinyBenchmarks/tinyMMLU",
        data="/no/where",
    )
    # HF_HUB_OFFLINE is set for all tests.
    pytest.importorskip("datasets")
    fails(r"tinyBenchmarks/tinyMMLU.*cannot be had.*config\.suite\.retention\.data=tiny", data="")
    fails(r"x\.npz'.*no such file.*retention\.convert_items", item_parameters="x.npz")
    (tmp_path / "tiny_gsm8k.jsonl").write_text('{"a": 1}\nhalf')
    fails(r"tiny_gsm8k\.jsonl is damaged", data=str(tmp_path), tasks=("tiny_gsm8k",))


@pytest.mark.slow
@pytest.mark.usefixtures("program_cache")
def test_the_command_with_both_backends(data, checkpoint, configured, tmp_path):
    few = ("suite.retention.tasks=tiny_winogrande,tiny_gsm8k", "suite.retention.max_new_tokens=4")
    common = (f"model.checkpoint={checkpoint}", "model.dtype=float32", f"suite.retention.data={data}", *few)
    records = {}
    for backend in ("jax", "hf"):
        summary = run(configured(CONFIG, *common, f"backend={backend}"), tmp_path / backend)
        assert summary["tinybenchmarks"]["tasks"]["tiny_winogrande"]["num_examples"] == 100
        with gzip.open(tmp_path / backend / "samples.jsonl.gz", "rt") as file:
            records[backend] = [json.loads(line) for line in file]
    for mine, theirs in zip(*records.values(), strict=True):
        assert mine["task_id"] == theirs["task_id"]
        if "log_probs" in mine:
            assert mine["log_probs"] == pytest.approx(theirs["log_probs"], abs=1e-4)
        else:
            assert mine["response"] == theirs["response"]
    page = (tmp_path / "jax" / "report.html").read_text()
    assert "accuracy, gsm8k_strict" in page and "<svg" in page and "accuracy, mmlu" not in page
