"""A suite added by the steps of docs/development.md alone: run by the evaluate command, shown on every page."""

from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.compare import main as compare
from cft_jax.evaluate.__main__ import run
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.store import run_resumable
from cft_jax.evaluate.suites.protocol import Headline, Suite
from cft_jax.evaluate.suites.registry import SUITES

ALL = Path(__file__).parents[3] / "configs" / "eval" / "all.py"


def check_toy(config, directory):
    if config.seed == 13:
        raise UserError("config.seed=13 brings bad luck; set another")


def run_toy(context):
    """How long are the answers?"""
    fingerprint = fingerprint_of("toy", 1, context.backend.fingerprint, context.config.seed)

    def measure(prompts):
        tokens = [context.tokenizer(prompt)["input_ids"] for prompt in prompts]
        settings = {"num_samples": 2, "max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0}
        drawn = context.backend.sample(tokens, seeds=[context.config.seed] * len(prompts), **settings)
        return [
            {"split": "toy", "task_id": prompt, "letters": sum(map(len, texts)) / 2, "samples": texts}
            for prompt, texts in zip(prompts, drawn, strict=True)
        ]

    with context.results.store(fingerprint) as store:
        prompts = ["Name a city.", "Name a bird."]
        records = run_resumable(
            store, prompts, lambda prompt: ("toy", prompt), measure, at_once=1, what="toy", unit="prompt"
        )
    metrics = {"mean_letters": sum(record["letters"] for record in records) / len(records)}
    return context.results.finish("toy", fingerprint, {}, metrics, rows=records, samples=records)


@pytest.fixture
def toy_suite(monkeypatch):
    row = Suite("Toy answers", check_toy, run_toy, (Headline("letters of an answer", ("mean_letters",), better=1),))
    monkeypatch.setitem(SUITES, "toy", row)


def test_a_suite_of_the_documented_steps(toy_suite, small_checkpoint, configured, program_cache, tmp_path, monkeypatch):
    which = (f"model.checkpoint={small_checkpoint}", "model.dtype=float32")
    summary = run(configured(ALL, *which, "eval.suites=toy,perplexity"), tmp_path / "both")
    (letters,) = summary["suites"]["toy"]["figures"].values()
    assert letters > 0 and "missing" in summary["suites"]["perplexity"]
    for shown, times in ((tmp_path / "both", 2), (tmp_path / "both/toy", 1)):
        page = tmp_path / "page.html"
        monkeypatch.setattr("sys.argv", ["compare", f"--output={page}", str(shown)])
        compare()
        # A row of the suite's own table, and one of the table of all suites where there are several.
        assert page.read_text(encoding="utf-8").count("letters of an answer") == times
        assert "Toy answers" in page.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="bad luck"):
        run(configured(ALL, *which, "eval.suites=toy", "seed=13"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_suite_that_there_is_not(small_checkpoint, configured, tmp_path):
    for suites, words in (("toy", "'toy'; suites are structured, .*retention, and all"), ("", "is empty; name some")):
        config = configured(ALL, f"model.checkpoint={small_checkpoint}", f"eval.suites={suites}")
        with pytest.raises(UserError, match=words):
            run(config, tmp_path / "new")
        assert not (tmp_path / "new").exists()
