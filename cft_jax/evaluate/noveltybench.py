"""The NoveltyBench suite (arXiv 2504.05228): how many different answers does a model give, and how good are they?

Three stages: the model generates answers, a classifier parts them into classes of equivalent ones, a reward model rates
the first of each class. Each keeps what it has done and builds on what the one before it kept, so that they can run one
after the other, apart (the scorers need no model, the model no scorers), or be killed and repeated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_json
from cft_jax.distributions import strip_thinking
from cft_jax.evaluate.asking import Asking, Drawing, draw
from cft_jax.evaluate.backend import Backend
from cft_jax.evaluate.metrics import partition_answers, score_list
from cft_jax.evaluate.noveltybench_sources import NoveltyPrompt, Scorer, find_classifier, find_reward_model
from cft_jax.evaluate.result_files import fingerprint_of, read_json, write_results
from cft_jax.evaluate.store import Record, ResultStore, measured
from cft_jax.suite_config import NoveltyBenchConfig

SUITE = "noveltybench"
GENERATIONS = "generations.json"
_PROMPTS_AT_ONCE = 8

PairScorer = Callable[[str, Sequence[str]], Sequence[float]]
RewardScorer = Callable[[str, Sequence[str]], Sequence[float]]


class IncompleteError(UserError):
    """A stage lacks something; what the stages before it found is in `summary`, as written."""

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


class _NotKeptError(Exception):
    """A stage that should not run now has not finished earlier."""


@dataclass(frozen=True)
class Generations:
    """What the first stage left, which the others read.

    Attributes:
      about: the contents of `generations.json`.
      prompts: in order.
      records: one per prompt.
    """

    about: Mapping[str, Any]
    prompts: Sequence[NoveltyPrompt]
    records: Sequence[Record]

    @classmethod
    def read(cls, directory: Path) -> "Generations":
        """Reads a directory.

        Raises:
          UserError: the first stage has not finished there.
        """
        about = read_json(directory / GENERATIONS)
        if about is None:
            raise UserError(
                f"{directory} holds no finished generations ({GENERATIONS}); run the stage generate first: "
                "--config.suite.noveltybench.stages=generate"
            )
        prompts = [NoveltyPrompt(*row) for row in about["prompts"]]
        with ResultStore(directory / "generate.jsonl", fingerprint=about["fingerprint"], write=False) as store:
            records = [store[p.split, _name(p.split, p.task_id, p.text)] for p in prompts]
        return cls(about, prompts, records)


def generate(
    backend: Backend,
    asking: Asking,
    prompts: Sequence[NoveltyPrompt],
    drawing: Drawing,
    directory: Path,
    *,
    checkpoint: str,
    write: bool,
) -> Generations:
    """The first stage: answers of the model to every prompt, kept in `directory`."""
    settings = {"method": asking.method, "max_new_tokens": asking.max_new_tokens, **asdict(drawing)}
    texts = [[prompt.split, prompt.task_id, prompt.text] for prompt in prompts]
    fingerprint = fingerprint_of(SUITE, backend.fingerprint, asking.name, settings)

    def answer(chunk: Sequence[NoveltyPrompt]) -> list[Record]:
        tokens = [asking.encode([{"role": "user", "content": prompt.text}]) for prompt in chunk]
        drawn = draw(backend, asking, drawing, tokens, [f"{SUITE}/{_name(p.split, p.task_id, p.text)}" for p in chunk])
        return [
            {
                "split": prompt.split,
                "task_id": _name(prompt.split, prompt.task_id, prompt.text),
                "samples": samples,
                "answers": {s: [strip_thinking(asking.read(t).text) for t in ts] for s, ts in samples.items()},
            }
            for prompt, samples in zip(chunk, drawn, strict=True)
        ]

    records = measured(
        directory / "generate.jsonl",
        prompts,
        lambda prompt: (prompt.split, _name(prompt.split, prompt.task_id, prompt.text)),
        answer,
        at_once=_PROMPTS_AT_ONCE,
        fingerprint=fingerprint,
        what="noveltybench, generate",
        unit="prompt",
        write=write,
    )
    about = {"checkpoint": checkpoint, "fingerprint": fingerprint, "settings": settings, "prompts": texts}
    if write:
        write_json(directory / GENERATIONS, about)
    return Generations(about, prompts, records)


def judge(
    found: Generations, settings: NoveltyBenchConfig, directory: Path, *, local_files_only: bool, write: bool
) -> dict[str, Any]:
    """Runs the stages of the scorers that `settings` asks for and writes the suite's files.

    Stages that are not asked for count where they have finished earlier, with the same scorers.

    Args:
      found: the generations.
      settings: of the suite.
      directory: where the files go.
      local_files_only: take scorers from the local cache alone.
      write: whether this process writes; process 0 does.

    Returns:
      The summary, as written.

    Raises:
      IncompleteError: a scorer is missing; what was found without it has been written.
    """
    classes = rewards = problem = None
    asked = "partition" in settings.stages
    try:
        scorer = find_classifier(settings, local_files_only=local_files_only or not asked)
        classes = partition(found, _only_if(asked, scorer), directory, threshold=settings.threshold, write=write)
        asked = "score" in settings.stages
        scorer = find_reward_model(settings, local_files_only=local_files_only or not asked)
        rewards = score(found, classes, _only_if(asked, scorer), directory, write=write)
    except UserError as error:
        problem = error if asked else None
    except _NotKeptError:
        pass
    if classes is None and problem is None and "score" in settings.stages:
        problem = UserError(
            "the stage score needs what the stage partition finds with this classifier and threshold; run that first"
        )
    names = ("classifier", "threshold", "reward_model", "patience")
    summary = finish(
        found,
        classes,
        rewards,
        directory,
        settings={name: value for name, value in asdict(settings).items() if name in names},
        patience=settings.patience,
        write=write,
    )
    if problem is not None:
        raise IncompleteError(str(problem), summary)
    return summary


def _only_if(asked: bool, scorer: Scorer) -> Scorer:
    """The scorer, or one that must not be needed."""

    def refuse() -> None:
        raise _NotKeptError

    return scorer if asked else Scorer(scorer.identity, refuse)


def partition(found: Generations, scorer: Scorer, directory: Path, *, threshold: float, write: bool) -> list[Record]:
    """The second stage: the class of every answer, for each seed, numbered in the order of their first answers."""
    loaded: list[PairScorer] = []

    def part(chunk: Sequence[Record]) -> list[Record]:
        if not loaded:
            loaded.append(scorer.load())
        return [_partition_record(record, loaded[0], threshold) for record in chunk]

    return measured(
        directory / "partition.jsonl",
        found.records,
        lambda record: (record["split"], record["task_id"]),
        part,
        at_once=1,
        fingerprint=_partition_fingerprint(found, scorer, threshold),
        what="noveltybench, partition",
        unit="prompt",
        write=write,
    )


def score(
    found: Generations, classes: Sequence[Record], scorer: Scorer, directory: Path, *, write: bool
) -> list[Record]:
    """The third stage: the reward of the first answer of every class; a repeat is worth nothing anyway."""
    loaded: list[RewardScorer] = []
    fingerprint = fingerprint_of(found.about["fingerprint"], scorer.identity)

    def rate(chunk: Sequence[tuple[NoveltyPrompt, Record, Record]]) -> list[Record]:
        if not loaded:
            loaded.append(scorer.load())
        return [_score_record(*item, loaded[0]) for item in chunk]

    return measured(
        directory / "score.jsonl",
        list(zip(found.prompts, found.records, classes, strict=True)),
        # Other classes have other first answers, so the classes are part of the name.
        lambda item: (item[1]["split"], _score_name(item[1], item[2])),
        rate,
        at_once=1,
        fingerprint=fingerprint,
        what="noveltybench, score",
        unit="prompt",
        write=write,
    )


def finish(
    found: Generations,
    classes: Sequence[Record] | None,
    rewards: Sequence[Record] | None,
    directory: Path,
    *,
    settings: Mapping[str, Any],
    patience: float,
    write: bool,
) -> dict[str, Any]:
    """Writes the suite's files from what the stages have found by now.

    Args:
      found: the generations.
      classes: records of the second stage, None where it has not run.
      rewards: records of the third.
      directory: where the files go.
      settings: of the scorers, recorded.
      patience: with which a reader goes on to the next answer.
      write: whether this process writes.

    Returns:
      The summary, as written: `splits` and `overall`, each with `mean_distinct` after the second stage and
      `mean_utility` after the third.
    """
    rows: list[Record] = []
    samples: list[Record] = []
    for index, (prompt, record) in enumerate(zip(found.prompts, found.records, strict=True)):
        row: Record = {"split": prompt.split, "task_id": prompt.task_id, "prompt": prompt.text}
        per_seed = []
        for seed, texts in record["samples"].items():
            sample = {"split": prompt.split, "task_id": prompt.task_id, "prompt": prompt.text, "seed": int(seed)}
            sample |= {"samples": texts, "answers": record["answers"][seed]}
            if classes is not None:
                sample["classes"] = classes[index]["classes"][seed]
                per_seed.append({"distinct": len(set(sample["classes"]))})
            if classes is not None and rewards is not None:
                sample["rewards"] = rewards[index]["rewards"][seed]
                per_seed[-1]["utility"] = _utility(sample["classes"], sample["rewards"], patience)
            samples.append(sample)
        for name in per_seed[0] if per_seed else ():
            row[name] = math.fsum(figures[name] for figures in per_seed) / len(per_seed)
        rows.append(row)
    splits = list(dict.fromkeys(prompt.split for prompt in found.prompts))
    summary = {
        "suite": SUITE,
        "checkpoint": found.about["checkpoint"],
        "fingerprint": found.about["fingerprint"],
        "settings": {**found.about["settings"], **settings},
        "splits": {split: _means([row for row in rows if row["split"] == split]) for split in splits},
        "overall": _means(rows),
    }
    if write:
        write_results(directory, summary, rows=rows, samples=samples)
    return summary


def _means(rows: Sequence[Record]) -> dict[str, float | int]:
    found: dict[str, float | int] = {"num_prompts": len(rows)}
    for name in ("distinct", "utility"):
        if rows and name in rows[0]:
            found[f"mean_{name}"] = math.fsum(row[name] for row in rows) / len(rows)
    return found


def _utility(classes: Sequence[int], rewards: Sequence[float | None], patience: float) -> float:
    raw = [math.nan if reward is None else reward for reward in rewards]
    return score_list(classes, raw, patience=patience).utility


def _partition_record(record: Record, scorer: PairScorer, threshold: float) -> Record:
    found = {
        seed: partition_answers(answers, scorer, threshold=threshold) for seed, answers in record["answers"].items()
    }
    return {
        "split": record["split"],
        "task_id": record["task_id"],
        "classes": {seed: list(partition.classes) for seed, partition in found.items()},
        "classifier_pairs": sum(partition.num_classifier_pairs for partition in found.values()),
    }


def _score_record(prompt: NoveltyPrompt, record: Record, classes: Record, scorer: RewardScorer) -> Record:
    rewards: dict[str, list[float | None]] = {}
    for seed, answers in record["answers"].items():
        numbers = classes["classes"][seed]
        first = [numbers.index(number) for number in range(len(set(numbers)))]
        found = dict(zip(first, scorer(prompt.text, [answers[index] for index in first]), strict=True))
        rewards[seed] = [_finite(found[index]) if index in found else None for index in range(len(answers))]
    return {"split": record["split"], "task_id": _score_name(record, classes), "rewards": rewards}


def _finite(reward: float) -> float | None:
    """JSON has no NaN; one counts like a missing reward, as the lowest."""
    return float(reward) if math.isfinite(reward) else None


def _name(split: str, task_id: str, text: str) -> str:
    """Another text under the same id is another prompt."""
    return f"{task_id}-{fingerprint_of(split, task_id, text)}"


def _score_name(record: Record, classes: Record) -> str:
    return f"{record['task_id']}-{fingerprint_of(classes['classes'])}"


def _partition_fingerprint(found: Generations, scorer: Scorer, threshold: float) -> str:
    return fingerprint_of(found.about["fingerprint"], scorer.identity, threshold)
