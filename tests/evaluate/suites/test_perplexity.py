"""Windows as in the golden cases; negative log-likelihoods as transformers computes them on the same windows."""

import gzip
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cft_jax.checkpoints import from_pretrained
from cft_jax.common.errors import UserError
from cft_jax.config.suites import PerplexityConfig, SuiteConfig
from cft_jax.evaluate.__main__ import run
from cft_jax.evaluate.backends.jax_backend import JaxBackend
from cft_jax.evaluate.metrics import Window, covering_windows, sliding_windows
from cft_jax.evaluate.report.page import render_page
from cft_jax.evaluate.report.runs import read_runs
from cft_jax.evaluate.suites import perplexity
from cft_jax.text.scratch import save_tokenizer, train_tokenizer

CONFIG = Path(__file__).parents[3] / "configs" / "eval" / "perplexity.py"


@pytest.fixture(scope="module")
def data(paloma):
    return paloma


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf, hf_config, paloma_texts):
    tokenizer = train_tokenizer([text for texts in paloma_texts.values() for text in texts])
    directory = tmp_path_factory.mktemp("model")
    model = write_hf(directory, hf_config("qwen3", vocab_size=len(tokenizer)))
    save_tokenizer(tokenizer, directory)
    return directory, tokenizer, model


def settings(data, /, **changes):
    return PerplexityConfig(**({"data": str(data), "context_length": 16, "stride": 8} | changes))


def with_bos(tokenizer, has_bos):
    tokenizer.bos_token = tokenizer.eos_token if has_bos else None
    return tokenizer


def test_paper_windows_are_the_golden_ones(golden_rows):
    rows = golden_rows("perplexity")
    assert len(rows) >= 25
    for row in rows:
        found = sliding_windows(
            row["length"],
            context_length=row["context_length"],
            stride=row["stride"],
            max_scored_tokens=row["max_scored_tokens"],
        )
        assert found == [Window(**window) for window in row["windows"]], row["length"]
        assert sum(window.num_scored for window in found) == row["total_scored"]


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("context, stride", [(16, 8), (16, 16), (16, 1), (2, 1), (2, 2)])
def test_covering_windows_score_every_token_once(context, stride, prefixed):
    for length in (0, 1, 2, 15, 16, 17, 33, 100):
        windows = covering_windows(length, context_length=context, stride=stride, prefixed=prefixed)
        scored = [w.first_scored + i for w in windows for i in range(w.num_scored)]
        assert scored == list(range(0 if prefixed else 1, length))
        for window in windows:
            assert window.end - window.begin + prefixed <= context
            # Something predicts the first: the prefix, or a token of the window.
            assert prefixed or window.begin < window.first_scored


def alone(model, rows):
    """-log p of every token but the first of each row, by torch in float64 from float32 logits."""
    found = []
    for row in rows:
        with torch.inference_mode():
            log_probs = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1).numpy()
        found.append(-log_probs[np.arange(len(row) - 1), row[1:]])
    return found


@pytest.mark.parametrize("has_bos", [False, True])
def test_metrics_are_those_of_transformers(run_suite, has_bos, data, paloma_texts, checkpoint, tmp_path):
    directory, tokenizer, model = checkpoint
    tokenizer = with_bos(tokenizer, has_bos)
    backend = JaxBackend(from_pretrained(directory, dtype=jnp.float32, param_dtype=jnp.float32), tokenizer)
    summary = run_suite(perplexity.run, backend, tokenizer, tmp_path, suite=SuiteConfig(perplexity=settings(data)))
    expected = {"paper": [], "covering": []}
    for name in ("code/test/c.jsonl.gz", "news/test/a.jsonl.gz", "news/test/b.jsonl.gz"):
        for text in paloma_texts[name]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            nll = [0.0, 0.0]
            for window in sliding_windows(len(ids), context_length=16, stride=8):
                losses = alone(model, [ids[window.begin : window.end]])[0]
                nll[0] += losses[window.first_scored - window.begin - 1 :].sum()
            prefix = [tokenizer.bos_token_id] if has_bos else []
            room = 16 - has_bos
            reached = 0 if has_bos else 1
            for begin in range(0, len(ids), 8):
                row = [*prefix, *ids[begin : begin + room]]
                new = min(begin + room, len(ids)) - reached
                if new > 0:
                    nll[1] += alone(model, [row])[0][-new:].sum()
                    reached += new
            expected["paper"].append((nll[0], max(len(ids) - 1, 0), len(text.encode())))
            unscored = 0 if has_bos or not ids else len(tokenizer.decode(ids[:1]).encode())
            scored = len(ids) if has_bos else max(len(ids) - 1, 0)
            expected["covering"].append((nll[1], scored, len(text.encode()) - unscored))
    for way, sums in expected.items():
        nll, scored, num_bytes = (sum(column) for column in zip(*sums, strict=True))
        figures = summary["total"][way]
        assert (figures["num_scored"], figures["num_bytes"]) == (scored, num_bytes), way
        assert figures["nll"] == pytest.approx(nll / scored, abs=1e-4), way
        assert figures["perplexity"] == pytest.approx(math.exp(nll / scored), rel=1e-4)
        assert figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-4)
    assert list(summary["slices"]) == ["code", "news"]
    parts = [summary["slices"][name]["paper"] for name in ("code", "news")]
    weighted = sum(part["nll"] * part["num_scored"] for part in parts) / sum(part["num_scored"] for part in parts)
    assert weighted == pytest.approx(summary["total"]["paper"]["nll"])
    with gzip.open(tmp_path / "samples.jsonl.gz", "rt") as file:
        documents = [json.loads(line) for line in file]
    assert [d["paper"]["nll"] for d in documents] == pytest.approx([s[0] for s in expected["paper"]], abs=1e-3)
    table = (tmp_path / "per_prompt.csv").read_text().splitlines()
    assert len(table) == 4 and "covering.bits_per_byte" in table[0]


class Uniform:
    """A backend that gives every token a probability known from the token alone."""

    fingerprint, max_length = "uniform", None

    def __init__(self, fail_after=10**9):
        self.calls, self.fail_after = 0, fail_after

    def token_log_probs(self, rows):
        self.calls += 1
        if self.calls > self.fail_after:
            raise KeyboardInterrupt
        return [-np.array([token % 7 for token in row[1:]], np.float32) for row in rows]

    def unasked(self, *_, **__):
        raise AssertionError("the suite asks for nothing else")

    sample = score = next_token_log_probs = log_likelihoods = unasked


def test_a_killed_run_ends_with_the_same_files(run_suite, data, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("cft_jax.evaluate.suites.perplexity._BYTES_AT_ONCE", 50)
    tokenizer = checkpoint[1]

    def measure(backend, name):
        return run_suite(
            perplexity.run, backend, tokenizer, tmp_path / name, suite=SuiteConfig(perplexity=settings(data))
        )

    whole = Uniform()
    summary = measure(whole, "whole")
    for fail_after in (0, 3, whole.calls - 1):
        with pytest.raises(KeyboardInterrupt):
            measure(Uniform(fail_after), f"killed{fail_after}")
        assert not (tmp_path / f"killed{fail_after}" / "summary.json").exists()
        rest = Uniform()
        assert measure(rest, f"killed{fail_after}") == summary
        # Two calls a batch, one for each way to cut.
        assert rest.calls == whole.calls - fail_after // 2 * 2
    for name in ("summary.json", "per_prompt.csv", "samples.jsonl.gz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed3" / name).read_bytes()
    # Finished work counts for the same texts alone.
    again = Uniform()
    measure(again, "whole")
    assert again.calls == 0


def test_one_way_and_few_documents(run_suite, data, checkpoint, tmp_path):
    asked = settings(data, windows=("covering",), max_documents=1)
    summary = run_suite(perplexity.run, Uniform(), checkpoint[1], tmp_path, suite=SuiteConfig(perplexity=asked))
    assert "paper" not in summary["total"] and summary["total"]["num_documents"] == 3


def test_some_slices(run_suite, data, checkpoint, tmp_path):
    asked = settings(data, slices=("code",))
    summary = run_suite(perplexity.run, Uniform(), checkpoint[1], tmp_path, suite=SuiteConfig(perplexity=asked))
    assert list(summary["slices"]) == ["code"] and summary["total"]["num_documents"] == 1


def test_missing_data_says_what_where_and_how(run_suite, data, checkpoint, tmp_path):
    def measure(**changes):
        asked = settings(data, **changes)
        return run_suite(perplexity.run, Uniform(), checkpoint[1], tmp_path, suite=SuiteConfig(perplexity=asked))

    with pytest.raises(UserError, match=r"perplexity\.data is empty; get the data with `hf download allenai/paloma"):
        measure(data="")
    with pytest.raises(UserError, match=r"/no/where.*no such directory.*hf download"):
        measure(data="/no/where")
    with pytest.raises(
        UserError, match=r"no files .*<slice>/train/\*\.jsonl\.gz; check .* slices and split, or get .*licence"
    ):
        measure(split="train")
    with pytest.raises(UserError, match=r"no files .*/c4_en/test/\*\.jsonl\.gz"):
        measure(slices=("code", "c4_en"))
    broken = tmp_path / "broken" / "s" / "test" / "x.jsonl.gz"
    broken.parent.mkdir(parents=True)
    for content in (b"no gzip", gzip.compress(b'{"text": "a"}\n{"txt": "b"}\n'), gzip.compress(b'{"text": 3}\n')):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.jsonl\.gz.*copy the file again"):
            measure(data=str(tmp_path / "broken"))


@pytest.mark.usefixtures("program_cache")
def test_the_command(data, checkpoint, configured, tmp_path):
    overrides = [f"suite.perplexity.data={data}", "suite.perplexity.context_length=16", "suite.perplexity.stride=16"]
    config = configured(CONFIG, f"model.checkpoint={checkpoint[0]}", "model.dtype=float32", *overrides)
    both = [
        run(config, tmp_path / "jax"),
        run(configured(CONFIG, f"model.checkpoint={checkpoint[0]}", "model.dtype=float32", "backend=hf", *overrides),
            tmp_path / "hf"),
    ]  # fmt: skip
    assert both[0]["total"]["paper"] == pytest.approx(both[1]["total"]["paper"], rel=1e-4)
    assert "bits_per_byte" in (tmp_path / "jax" / "report.html").read_text()


def test_models_side_by_side(run_suite, data, checkpoint, tmp_path):
    for name in ("base", "soft"):
        run_suite(
            perplexity.run,
            Uniform(),
            checkpoint[1],
            tmp_path / name,
            name,
            suite=SuiteConfig(perplexity=settings(data)),
        )
    page = render_page(read_runs([tmp_path / "base", tmp_path / "soft"]))
    assert "Bits per byte" in page and page.count("<svg") == 1
    assert "perplexity, with BOS, every token" in page
