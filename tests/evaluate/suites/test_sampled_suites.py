"""The suites of open-ended answers: by a scripted model whose metrics are known, and by real models end to end."""

import csv
import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from cft_jax.common.errors import UserError
from cft_jax.config.suites import EvalConfig, OpenRandomConfig, SuiteConfig
from cft_jax.evaluate.__main__ import run
from cft_jax.evaluate.suites import mcq as mcq_suite
from cft_jax.evaluate.suites import open_random as open_random_suite
from cft_jax.evaluate.suites.mcq import read_prompt
from cft_jax.evaluate.suites.open_random import read_prompts, support_sizes
from cft_jax.text.scratch import train_tokenizer

CONFIGS = Path(__file__).parents[3] / "configs" / "eval"
FILES = ("summary.json", "per_prompt.csv", "samples.jsonl.gz")
CITIES = ["Name a city.", "Name a far city.", "Name a small city."]


class Scripted:
    """A backend that answers from a list, in order; after `fail_after` calls it is killed."""

    fingerprint, max_length = "scripted", None

    def __init__(self, texts, *, fail_after=10**9):
        self.texts, self.fail_after, self.calls, self.asked = texts, fail_after, 0, []

    def sample(self, prompts, *, seeds, num_samples, max_new_tokens, temperature, top_p, stop=()):
        assert len(seeds) == len(prompts) and not stop
        self.calls += 1
        if self.calls > self.fail_after:
            raise KeyboardInterrupt
        self.asked += zip(map(tuple, prompts), seeds, strict=True)
        return [[self.texts[i % len(self.texts)] for i in range(num_samples)] for _ in prompts]

    def next_token_log_probs(self, prompts):
        probs = np.array([0.5, 0.25, 0.125, 0.125], np.float32)
        return np.log(np.tile(probs, (len(prompts), 1)))

    def score(self, prompts, tries, *, prefixes):
        raise AssertionError("no suite under test asks for this")

    def log_likelihoods(self, requests):
        raise AssertionError("no suite under test asks for this")

    def token_log_probs(self, rows):
        raise AssertionError("no suite under test asks for this")


def read_samples(directory):
    with gzip.open(directory / "samples.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*CITIES, "Question: A. B. C. D."])


@pytest.fixture
def open_random(run_suite, tokenizer, tmp_path):
    """Runs the suite on the three cities, four samples each: open_random(model, directory, **fields of config.eval)."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(CITIES))
    suite = SuiteConfig(open_random=OpenRandomConfig(str(prompts), num_samples=0))

    def start(model, directory, **fields):
        settings = EvalConfig(**{"num_samples": 4, **fields})
        return run_suite(open_random_suite.run, model, tokenizer, directory, eval=settings, suite=suite)

    return start


def test_open_random_metrics(open_random, tmp_path):
    model = Scripted(["Oslo", ' "Oslo"\nNorway', "Rome", "<think>hm</think> "])
    summary = open_random(model, tmp_path)
    # By hand: of four outputs two are Oslo, one Rome, one empty.
    assert summary["mean_num_unique"] == 2 and summary["mean_unique_fraction"] == 0.5
    assert summary["mean_entropy"] == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert summary["mean_empty_rate"] == summary["mean_thinking_rate"] == 0.25
    assert summary["mean_degraded_rate"] == 0 and "left_out" not in summary
    sizes = summary["mean_support_sizes"]
    assert len(sizes) == 21
    assert (sizes["0.50"], sizes["0.55"], sizes["0.75"], sizes["0.99"]) == (1, 2, 2, 4)
    rows = list(csv.DictReader((tmp_path / "per_prompt.csv").read_text().splitlines()))
    assert [row["prompt"] for row in rows] == CITIES
    assert rows[0]["support_size_0.99"] == "4"
    samples = read_samples(tmp_path)
    assert samples[0]["samples"] == model.texts
    assert samples[0]["answers"] == ["Oslo", "Oslo", "Rome", ""]
    assert len({seed for _, seed in model.asked}) == 3


def test_open_random_without_any_answer(open_random, tmp_path):
    summary = open_random(Scripted([""]), tmp_path)
    assert "mean_entropy" not in summary and summary["left_out"] == {"entropy": 3}
    assert summary["mean_num_unique"] == 0


def test_string_seeds_are_read_and_kept(open_random, tmp_path):
    texts = ["<random_string>q</random_string><answer>Oslo</answer>", "<thinking>Rome?</thinking>\nRome"]
    summary = open_random(Scripted(texts), tmp_path, method="ssot")
    assert summary["mean_num_unique"] == 2 and summary["mean_degraded_rate"] == 0.5
    # The next token begins a random string: its support says nothing about the answer.
    assert "mean_support_sizes" not in summary
    samples = read_samples(tmp_path)[0]
    assert samples["samples"][:2] == texts and samples["answers"][:2] == ["Oslo", "Rome"]


def test_support_sizes_are_golden(golden_rows):
    for case in golden_rows("parsing", "top_p"):
        if not case["rounding_sensitive"]:
            with np.errstate(divide="ignore"):
                sizes = support_sizes(np.log(np.array(case["probs"], np.float64)).astype(np.float32))
            assert list(sizes.values()) == case["sizes_f32"] == case["sizes_f64"], case["name"]


def test_several_seeds_are_averaged(open_random, tmp_path):
    summary = open_random(Scripted(["a", "b"]), tmp_path, seeds=(1, 2))
    assert summary["mean_num_unique"] == 2
    assert [row["seed"] for row in read_samples(tmp_path)][:2] == [1, 2]


def test_the_packages_prompts_and_those_of_others(tmp_path):
    own = read_prompts("")
    assert len(own) >= 120 and len({prompt.text for prompt in own}) == len(own)
    assert own[46].text == "Pick an inventor at random. Reply with it alone."
    # Results of other prompts are others: the text of all 143, in order.
    digest = hashlib.sha256("\n".join(prompt.text for prompt in own).encode()).hexdigest()
    assert digest == "48a074c59b4ecdf7bba5ec73711cccda5a28232cad7e632796fc8692a8a5e5b4"
    file = tmp_path / "mine.json"
    file.write_text('["Name a fish.", "Name a bird."]')
    mine = read_prompts(str(file))
    assert [prompt.text for prompt in mine] == ["Name a fish.", "Name a bird."]
    file.write_text('["Name a fish.", "Name a bird.", "Name a tree."]')
    assert read_prompts(str(file))[:2] == mine
    for content in ("[]", '{"a": 1}', '["", "x"]', "[1]", "{"):
        file.write_text(content)
        with pytest.raises(UserError, match=r"suite\.open_random\.prompts"):
            read_prompts(str(file))
    with pytest.raises(UserError, match=r"absent\.json.*No such file.*leave it empty"):
        read_prompts(str(tmp_path / "absent.json"))


QUESTION = "Question: Which?\nA. 1\nB. 2\nC. 3\nD. 4\nCorrect Answer: {}\nExplanation: So."


@pytest.fixture
def mcq(run_suite, tokenizer):
    """Runs the suite, four questions: mcq(model, directory, **fields of config.eval)."""

    def start(model, directory, **fields):
        settings = EvalConfig(**{"num_samples": 4, **fields})
        return run_suite(mcq_suite.run, model, tokenizer, directory, eval=settings)

    return start


def test_mcq_metrics(mcq, tmp_path):
    model = Scripted([QUESTION.format("C"), QUESTION.format("C"), QUESTION.format("A"), "I cannot."])
    summary = mcq(model, tmp_path)
    assert summary["parse_rate"] == 0.75 and summary["count_c"] == 2
    # What was asked, so that comparisons see whether it was the same.
    assert summary["settings"]["prompt"] == read_prompt("")
    # By hand: frequencies 1/3, 0, 2/3, 0.
    assert summary["tv_distance_from_uniform"] == pytest.approx(0.5)
    assert summary["max_abs_deviation_from_uniform"] == pytest.approx(2 / 3 - 1 / 4)
    assert summary["answers"][2] == {"answer_label": "C", "count": 2, "frequency": pytest.approx(2 / 3)}
    assert summary["format_errors"]["unexpected_line"] == 1
    rows = list(csv.DictReader((tmp_path / "per_prompt.csv").read_text().splitlines()))
    assert [row["correct_answer"] for row in rows] == ["C", "C", "A", ""]
    assert read_samples(tmp_path)[0]["samples"] == model.texts


def test_mcq_with_nothing_to_read_has_no_metrics(mcq, tmp_path):
    summary = mcq(Scripted(["no"]), tmp_path)
    assert summary["parse_rate"] == 0 and summary["num_samples"] == 4
    for name in ("freq_a", "chi_square_statistic", "tv_distance_from_uniform", "max_abs_deviation_from_uniform"):
        assert name not in summary


def test_mcq_prompts(tmp_path):
    assert "Correct Answer:" in read_prompt("")
    (tmp_path / "own.txt").write_text(" Write one.\n")
    assert read_prompt(str(tmp_path / "own.txt")) == "Write one."
    (tmp_path / "own.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        read_prompt(str(tmp_path / "own.txt"))
    with pytest.raises(UserError, match=r"suite\.mcq\.prompt=/no/where.*leave it empty"):
        read_prompt("/no/where")


@pytest.mark.parametrize("name", ["open_random", "mcq"])
def test_a_killed_evaluation_resumes(name, request, tmp_path, monkeypatch):
    suite = request.getfixturevalue(name)
    monkeypatch.setattr("cft_jax.evaluate.suites.open_random._PROMPTS_AT_ONCE", 1)
    monkeypatch.setattr("cft_jax.evaluate.suites.mcq._QUESTIONS_AT_ONCE", 2)
    texts = [QUESTION.format(label) for label in "ABD"]
    suite(whole := Scripted(texts), tmp_path / "whole", num_samples=5)
    with pytest.raises(KeyboardInterrupt):
        suite(Scripted(texts, fail_after=2), tmp_path / "killed", num_samples=5)
    assert not (tmp_path / "killed/summary.json").exists()
    again = Scripted(texts)
    suite(again, tmp_path / "killed", num_samples=5)
    assert again.calls == whole.calls - 2 == 1
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


SMALL = ("eval.max_prompts_per_split=3", "eval.num_samples=6", "model.dtype=float32")


def test_open_random_on_a_real_model(small_checkpoint, configured, program_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("cft_jax.evaluate.suites.open_random._PROMPTS_AT_ONCE", 2)
    which = (f"model.checkpoint={small_checkpoint}", *SMALL, "suite.open_random.max_new_tokens=6")
    config = configured(CONFIGS / "open_random.py", *which)
    jax_summary = run(config, tmp_path / "jax")
    assert jax_summary["num_prompts"] == 3 and jax_summary["settings"]["num_samples"] == 6
    hf_summary = run(configured(CONFIGS / "open_random.py", *which, "backend=hf"), tmp_path / "hf")
    assert jax_summary["median_support_sizes"] == hf_summary["median_support_sizes"]
    assert {"report.html", "config.json", *FILES} <= {path.name for path in (tmp_path / "jax").iterdir()}


@pytest.mark.slow
def test_mcq_on_a_real_model(small_checkpoint, configured, program_cache, tmp_path):
    which = (f"model.checkpoint={small_checkpoint}", *SMALL, "suite.mcq.max_new_tokens=6")
    summary = run(configured(CONFIGS / "mcq.py", *which), tmp_path / "out")
    assert summary["num_samples"] == 6 and summary["parse_rate"] == 0
    assert "tv_distance_from_uniform" not in summary
    with pytest.raises(UserError, match="num_samples=0"):
        run(configured(CONFIGS / "mcq.py", *which, "eval.num_samples=0"), tmp_path / "none")


def test_string_seeds_on_a_real_model(small_checkpoint, configured, program_cache, tmp_path, monkeypatch):
    # The small tokenizer spells texts out in bytes; the method's own would be thousands of tokens.
    short = {"role": "system", "content": "Seed."}
    monkeypatch.setattr("cft_jax.evaluate.prompting.seeded_messages", lambda messages, *_: [short, *messages])
    which = (f"model.checkpoint={small_checkpoint}", *SMALL, "eval.method=ssot", "suite.ssot.max_new_tokens=6")
    families = ("data.train_families=binomial", "data.heldout_families=poisson", "eval.suites=structured,open_random")
    few = ("suite.open_random.num_samples=6", "eval.max_prompts_per_split=1")
    config = configured(CONFIGS / "all.py", *which, *families, *few)
    summary = run(config, tmp_path / "out")
    assert summary["suites"]["open_random"]["figures"].keys() >= {"unique answers"}
    structured = json.loads((tmp_path / "out/structured/summary.json").read_text())
    assert structured["protocol"] == "ssot"
    split = structured["splits"]["test_unseen_params"]
    assert "exact" not in split and split["lenient_parses"]["without_answer_tag"] == 6 * split["num_prompts"]
    assert json.loads((tmp_path / "out/open_random/summary.json").read_text())["mean_degraded_rate"] == 1


def test_a_missing_file_leaves_nothing(small_checkpoint, configured, tmp_path):
    config = configured(
        CONFIGS / "open_random.py", f"model.checkpoint={small_checkpoint}", "suite.open_random.prompts=/no/where.json"
    )
    with pytest.raises(UserError, match=r"/no/where\.json"):
        run(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
