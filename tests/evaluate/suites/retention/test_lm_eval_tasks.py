"""lm-eval through the adapter against lm-eval through its own class for transformers, on the same exported weights.

Tolerance 1e-4 for float32 log-likelihoods of torch and JAX on CPU; scores are identical.
"""

import gzip
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from cft_jax.checkpoints import from_pretrained
from cft_jax.common.errors import UserError
from cft_jax.config.suites import LmEvalConfig, SuiteConfig
from cft_jax.evaluate.__main__ import run
from cft_jax.evaluate.backends.jax_backend import JaxBackend
from cft_jax.evaluate.store import ResultStore
from cft_jax.evaluate.suites.retention import lm_eval_tasks
from cft_jax.evaluate.suites.retention.lm_eval_tasks import BackendModel, load_tasks, run_lm_eval, task_manager
from cft_jax.text import ChatOptions
from cft_jax.text.scratch import save_tokenizer, train_tokenizer

CONFIG = Path(__file__).parents[4] / "configs" / "eval" / "retention.py"
TASKS = ("local_choices", "local_word", "local_text", "local_answer")
WORDS = "the a red green small tall bird stone river house sings falls runs shines today and then again".split()
MAX_LENGTH = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def sentence(seed, length):
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 1)) % len(WORDS)] for i in range(length))


_CHOICES = """
task: local_choices
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
num_fewshot: 1
fewshot_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_WORD = """
task: local_word
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_TEXT = """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
_ANSWER = """
task: local_answer
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["e ", "qq"], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Four tasks over local data, one of each kind of request; some rows are longer than the model's row."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": sentence(i, 3 + 5 * (i % 3)),
            "choices": [sentence(i + k, k + 1) for k in range(4)],
            "answer": i % 4,
            "word": WORDS[i],
            "text": sentence(i, 4 + 11 * i),
        }
        for i in range(8)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in zip(TASKS, (_CHOICES, _WORD, _TEXT, _ANSWER), strict=True):
        data = {"data_files": {"test": str(root / "rows.jsonl")}, "cache_dir": str(root / "cache")}
        where = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(data)}\n"
        (root / f"{name}.yaml").write_text(where + text.lstrip())
    return LmEvalConfig(include_path=str(root), max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf, hf_config, tokenizer):
    directory = tmp_path_factory.mktemp("model")
    write_hf(directory, hf_config("qwen3", vocab_size=len(tokenizer)))
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def evaluated(settings, checkpoint, tokenizer, tmp_path_factory):
    """What lm-eval says of both models."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    backend = JaxBackend(from_pretrained(checkpoint, dtype=jnp.float32, param_dtype=jnp.float32), tokenizer)
    with ResultStore(tmp_path_factory.mktemp("store") / "store.jsonl", fingerprint="it", write=True) as store:
        ours = BackendModel(backend, tokenizer, store, max_length=MAX_LENGTH, options=ChatOptions(), seed=11)
        assert ours.world_size == 1
        theirs = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=4, max_length=MAX_LENGTH)
        return [
            simple_evaluate(
                model=model,
                tasks=load_tasks(TASKS, settings),
                task_manager=task_manager(settings.include_path),
                bootstrap_iters=0,
            )
            for model in (ours, theirs)
        ]


def log_probs(results, task):
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["resps"]]


def test_scores_are_identical(evaluated):
    ours, theirs = (results["results"] for results in evaluated)
    assert set(ours) == set(theirs) == set(TASKS)
    for task in ("local_choices", "local_answer"):
        assert ours[task] == theirs[task]
    assert ours["local_word"]["acc,none"] == theirs["local_word"]["acc,none"]
    for task, figure in (("local_word", "perplexity,none"), ("local_text", "bits_per_byte,none")):
        assert ours[task][figure] == pytest.approx(theirs[task][figure], rel=1e-4)


def test_log_likelihoods_are_equal(evaluated):
    for task in TASKS[:3]:
        ours, theirs = (log_probs(results, task) for results in evaluated)
        assert len(ours) >= 8
        for mine, other in zip(ours, theirs, strict=True):
            (mine,), (other,) = mine, other
            if task == "local_text":
                assert mine == pytest.approx(other, abs=1e-3, rel=1e-6)  # sums over hundreds of tokens
            else:
                assert mine[0] == pytest.approx(other[0], abs=1e-4)
                assert mine[1] == other[1]


def test_generated_texts_are_equal(evaluated):
    ours, theirs = (log_probs(results, "local_answer") for results in evaluated)
    assert ours == theirs
    assert any(text for (text,) in ours)


def test_a_killed_run_ends_with_the_same_files(run_suite, scripted_model, settings, tokenizer, tmp_path, monkeypatch):
    def counting(fail_after=10**9):
        return scripted_model(
            log_prob=lambda request: -float(sum(request[1]) % 97) / 7,
            text=lambda prompt: WORDS[sum(prompt) % len(WORDS)],
            stop="e ",
            fail_after=fail_after,
        )

    monkeypatch.setattr(lm_eval_tasks, "_REQUESTS_AT_ONCE", 10)

    def measure(backend, name):
        suite = SuiteConfig(lm_eval=settings)
        return run_suite(run_lm_eval, backend, tokenizer, tmp_path / name, tasks=TASKS, suite=suite)

    whole = counting()
    summary = measure(whole, "whole")
    assert set(summary["lm_eval"]["tasks"]) == set(TASKS) and summary["lm_eval"]["version"].startswith("0.")
    with pytest.raises(KeyboardInterrupt):
        measure(counting(4), "killed")
    rest = counting()
    assert measure(rest, "killed") == summary
    assert rest.calls == whole.calls - 4
    for name in ("summary.json", "per_prompt.csv", "samples.jsonl.gz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    with gzip.open(tmp_path / "whole" / "samples.jsonl.gz", "rt") as file:
        assert len(list(file)) == 8 * len(TASKS)


def test_mistakes_say_what_to_do(settings, tmp_path):
    with pytest.raises(UserError, match=r"config\.tasks has no_such_task, which lm-eval does not know; `lm-eval ls"):
        load_tasks(("local_word", "no_such_task"), settings)
    with pytest.raises(UserError, match="include_path='/no/where': no such directory"):
        load_tasks(("local_word",), LmEvalConfig(include_path="/no/where"))
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/none.jsonl}}}}\ndoc_to_text: x\ndoc_to_target: y\n"
    )
    with pytest.raises(UserError, match=r"the data of broken cannot be had"):
        load_tasks(("broken",), LmEvalConfig(include_path=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.usefixtures("program_cache")
def test_the_command(settings, checkpoint, configured, tmp_path):
    config = configured(
        CONFIG,
        f"model.checkpoint={checkpoint}",
        "model.dtype=float32",
        "tasks=local_choices,local_answer",
        f"suite.lm_eval.include_path={settings.include_path}",
        "suite.lm_eval.limit=3",
        f"suite.lm_eval.max_length={MAX_LENGTH}",
    )
    summary = run(config, tmp_path)
    assert set(summary["lm_eval"]["tasks"]) == {"local_choices", "local_answer"}
    assert "tinybenchmarks" not in summary
    table = (tmp_path / "per_prompt.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 3
    assert "local_choices" in (tmp_path / "report.html").read_text()
