"""NoveltyBench: a small DeBERTa and a small reward model made on the spot, three stages together, apart and killed."""

import csv
import gzip
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from cft_jax.common.errors import UserError
from cft_jax.config.suites import NoveltyBenchConfig
from cft_jax.evaluate import metrics
from cft_jax.evaluate.__main__ import run
from cft_jax.evaluate.suites.noveltybench.judges import Classifier, RewardModel, checkpoint_identity
from cft_jax.evaluate.suites.noveltybench.sources import find_classifier, read_novelty_prompts

CONFIG = Path(__file__).parents[4] / "configs" / "eval" / "noveltybench.py"
FILES = ("summary.json", "per_prompt.csv", "samples.jsonl.gz")
LONG = [
    "the quick brown fox jumps over the lazy dog",
    "a slow green turtle sleeps under the old bridge",
    "the quick brown fox jumps over the lazy cat",
]


@pytest.fixture(scope="module", autouse=True)
def two_prompts_at_once():
    """So that there is a half-way to be killed at, with the shapes of all other runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cft_jax.evaluate.suites.noveltybench.suite._PROMPTS_AT_ONCE", 2)
        yield


def test_the_classifier_reads_pairs(classifier):
    judge = Classifier(classifier, classifier, dtype="float32", batch=2)
    together = judge(LONG[0], LONG)
    alone = [judge(LONG[0], [other])[0] for other in LONG]
    # Padding must not matter; nor may the order of a pair be lost.
    assert together == pytest.approx(alone, abs=1e-6)
    assert all(0 < p < 1 for p in together) and len({round(p, 4) for p in together}) == 3
    assert judge(LONG[1], [LONG[0]])[0] != pytest.approx(judge(LONG[0], [LONG[1]])[0], abs=1e-4)
    # By hand, by transformers' own pair encoding.
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in LONG[:2])
    ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id, *second, tokenizer.sep_token_id]
    kinds = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits
    assert together[1] == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-6)


def test_the_reward_does_not_depend_on_the_batch(reward_model):
    judge = RewardModel(reward_model, dtype="float32", batch=3)
    answers = ["short", "a much longer answer than the first", "", "another"]
    together = judge("Tell me.", answers)
    assert together == pytest.approx([judge("Tell me.", [answer])[0] for answer in answers], abs=1e-5)
    assert len({round(reward, 3) for reward in together}) == 4
    assert judge("Something else.", answers) != pytest.approx(together, abs=1e-3)


def test_scorers_that_do_not_fit(classifier, reward_model, tmp_path):
    with pytest.raises(UserError, match="a reward model has 1"):
        RewardModel(classifier, dtype="float32", batch=1)
    with pytest.raises(UserError, match="a classifier of pairs has 2"):
        Classifier(reward_model, reward_model, dtype="float32", batch=1)


def test_what_could_not_be_loaded_is_said_at_once(classifier, tmp_path):
    def find(directory, tokenizer=""):
        fields = {"classifier": str(directory), "classifier_tokenizer": str(tokenizer)}
        return find_classifier(NoveltyBenchConfig(**fields), local_files_only=True)

    bare = tmp_path / "bare"
    shutil.copytree(classifier, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match=r"classifier_tokenizer=no/tokenizer.*hf download no/tokenizer"):
        find(bare, "no/tokenizer")
    # As the published one: weights in one place, the tokenizer in another.
    judge = find(bare, classifier).load()
    assert judge(LONG[0], LONG) == find(classifier).load()(LONG[0], LONG)
    (tmp_path / "spelt").mkdir()
    (tmp_path / "spelt/spm.model").touch()
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(UserError, match=r"sentencepiece: pip install"):
            find(bare, tmp_path / "spelt")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors"):
        find(bare, classifier)


def test_scorers_are_told_apart_by_their_last_byte(classifier, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(classifier, directory)
    weights = directory / "model.safetensors"
    same, content = checkpoint_identity(directory), weights.read_bytes()
    assert same == checkpoint_identity(classifier)
    # The hub's cache: links to files that lie under their hashes, which stand for the contents.
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    blob = blobs / hashlib.sha256(content).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    assert checkpoint_identity(directory) == same
    weights.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint_identity(directory) != same


@pytest.fixture(scope="module")
def settings(small_checkpoint, classifier, reward_model, novelty_prompts, configured):
    """The suite's configuration with overrides."""

    def make(*overrides):
        return configured(
            CONFIG,
            f"model.checkpoint={small_checkpoint}",
            "model.dtype=float32",
            "eval.num_samples=5",
            "suite.noveltybench.max_new_tokens=120",
            f"suite.noveltybench.data={novelty_prompts}",
            f"suite.noveltybench.classifier={classifier}",
            f"suite.noveltybench.reward_model={reward_model}",
            "suite.noveltybench.reward_dtype=float32",
            "suite.noveltybench.threshold=0.002",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def whole(settings, program_cache, tmp_path_factory):
    """The directory of an undisturbed evaluation."""
    directory = tmp_path_factory.mktemp("whole")
    run(settings(), directory)
    return directory


def test_metrics_are_those_of_the_answers(whole, classifier, reward_model):
    summary = json.loads((whole / "summary.json").read_text())
    assert {name: split["num_prompts"] for name, split in summary["splits"].items()} == {"curated": 3, "wildchat": 1}
    with gzip.open(whole / "samples.jsonl.gz", "rt") as file:
        samples = [json.loads(line) for line in file]
    judge, reward = (
        Classifier(classifier, classifier, dtype="float32", batch=4),
        RewardModel(reward_model, dtype="float32", batch=4),
    )
    lists = []
    for row in samples:
        assert len(row["samples"]) == 5
        got = metrics.partition_answers(row["answers"], judge, threshold=0.002)
        assert list(got.classes) == row["classes"]
        lists.append(metrics.score_list(got.classes, reward(row["prompt"], row["answers"]), patience=0.8))
    expected = metrics.noveltybench_summary(lists)
    assert summary["overall"] == {name: pytest.approx(value) for name, value in expected.items()}
    assert 1 < summary["overall"]["mean_distinct"] < 5
    rows = list(csv.DictReader((whole / "per_prompt.csv").read_text().splitlines()))
    assert [row["task_id"] for row in rows] == ["c-0", "c-1", "c-2", "w-0"]
    assert float(rows[0]["utility"]) == pytest.approx(lists[0].utility)
    assert "utility" in (whole / "report.html").read_text(encoding="utf-8")


def test_stages_run_apart(whole, settings, tmp_path, monkeypatch):
    first = run(settings("suite.noveltybench.stages=generate"), tmp_path / "apart")
    assert first["overall"] == {"num_prompts": 4}
    # From here on no model is needed.
    monkeypatch.setattr("cft_jax.jobs.evaluate.load_measured_model", None)
    with pytest.raises(UserError, match="stage partition"):
        run(settings("suite.noveltybench.stages=score"), tmp_path / "apart")
    second = run(settings("suite.noveltybench.stages=partition"), tmp_path / "apart")
    assert "mean_distinct" in second["overall"] and "mean_utility" not in second["overall"]
    run(settings("suite.noveltybench.stages=score"), tmp_path / "apart")
    for name in FILES:
        assert (tmp_path / "apart" / name).read_bytes() == (whole / name).read_bytes(), name
    with pytest.raises(UserError, match="run the stage generate first"):
        run(settings("suite.noveltybench.stages=partition"), tmp_path / "new")


@pytest.mark.slow
def test_each_stage_goes_on_after_an_interruption(whole, settings, tmp_path, monkeypatch):
    places = (
        ("cft_jax.evaluate.backends.jax_backend.JaxBackend.sample", 1),
        ("cft_jax.evaluate.suites.noveltybench.judges.Classifier.__call__", 3),
        ("cft_jax.evaluate.suites.noveltybench.judges.RewardModel.__call__", 2),
    )
    for place, calls in places:
        owner, _, name = place.rpartition(".")
        module, _, kind = owner.rpartition(".")
        real = getattr(getattr(__import__(module, fromlist=[kind]), kind), name)
        left = [calls]

        def killed(self, *args, real=real, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                run(settings(), tmp_path / "killed")
    run(settings(), tmp_path / "killed")
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_is_missing_is_said_before_any_work(settings, tmp_path):
    for override, words in (
        ("data=/no/where.jsonl", r"/no/where\.jsonl: no such file.*hf download yimingzhang/novelty-bench"),
        ("data=", r"suite\.noveltybench\.data is empty.*hf download"),
        ("classifier=/no/classifier", r"noveltybench\.classifier=/no/classifier.*stages=generate"),
        ("reward_model=no/such-model", r"noveltybench\.reward_model=no/such-model.*hf download no/such-model"),
    ):
        with pytest.raises(UserError, match=words):
            run(settings(f"suite.noveltybench.{override}", "model.local_files_only=True"), tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_beside_other_suites_a_missing_scorer_leaves_the_rest(settings, program_cache, tmp_path):
    few = ("eval.suites=noveltybench,mcq", "suite.mcq.max_new_tokens=4", "suite.noveltybench.reward_model=/no/model")
    summary = run(settings(*few), tmp_path / "all")
    novelty = summary["suites"]["noveltybench"]
    assert "/no/model" in novelty["incomplete"]
    figures = novelty["figures"]
    assert "distinct, all prompts" in figures and "utility, all prompts" not in figures
    assert "parsed" in summary["suites"]["mcq"]["figures"]
    assert "/no/model" in (tmp_path / "all/report.html").read_text(encoding="utf-8")


def test_prompts_from_files(tmp_path):
    def read(**fields):
        return read_novelty_prompts(NoveltyBenchConfig(**fields))

    for split in ("curated", "wildchat"):
        (tmp_path / f"{split}.jsonl").write_text('{"id": 1, "prompt": "a"}\n\n{"id": "2", "prompt": "b"}\n')
    found = read(data=str(tmp_path))
    assert [(p.split, p.task_id, p.text) for p in found] == [
        ("curated", "1", "a"), ("curated", "2", "b"), ("wildchat", "1", "a"), ("wildchat", "2", "b"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"holds no other\.jsonl"):
        read(data=str(tmp_path), splits=("other",))
    mine = tmp_path / "mine.jsonl"
    for content, words in (
        ('{"id": 1}', "line 1: a row needs"),
        ("{", "line 1 is no JSON"),
        ("", "holds no prompts"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "'1' twice"),
    ):
        mine.write_text(content)
        with pytest.raises(UserError, match=words):
            read(data=str(mine))
