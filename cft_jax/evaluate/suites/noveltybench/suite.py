"""The NoveltyBench suite (arXiv 2504.05228): how many different answers does a model give, and how good are they?

Three stages: the model generates answers, a classifier parts them into classes of equivalent ones, a reward model rates
the first of each class. Each keeps what it has done and builds on what the one before it kept, so that they can run one
after the other, apart (the scorers need no model, the model no scorers), or be killed and repeated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_json
from cft_jax.config.suites import NoveltyBenchConfig
from cft_jax.distributions import strip_thinking
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.metrics import partition_answers, score_list
from cft_jax.evaluate.prompting import PromptStrategy, SamplingConfig, draw, settings_of
from cft_jax.evaluate.results import Results, fingerprint_of, read_json
from cft_jax.evaluate.store import Record, ResultStore, measured
from cft_jax.evaluate.suites.noveltybench.sources import NoveltyPrompt, Scorer, find_classifier, find_reward_model

SUITE = "noveltybench"
GENERATIONS = "generations.json"
_GENERATE = "generate.jsonl"
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
        with ResultStore(directory / _GENERATE, fingerprint=about["fingerprint"], write=False) as store:
            records = [store[prompt.split, _name(prompt)] for prompt in prompts]
        return cls(about, prompts, records)


def generate(
    backend: Backend,
    strategy: PromptStrategy,
    prompts: Sequence[NoveltyPrompt],
    sampling: SamplingConfig,
    results: Results,
) -> Generations:
    """The first stage: answers of the model to every prompt, kept in the directory of the results."""
    settings = settings_of(strategy, sampling)
    fingerprint = fingerprint_of(SUITE, backend.fingerprint, strategy.name, settings)

    def answer(chunk: Sequence[NoveltyPrompt]) -> list[Record]:
        tokens = [strategy.encode([{"role": "user", "content": prompt.text}]) for prompt in chunk]
        drawn = draw(backend, strategy, sampling, tokens, [f"{SUITE}/{_name(prompt)}" for prompt in chunk])
        return [
            {
                "split": prompt.split,
                "task_id": _name(prompt),
                "samples": samples,
                "answers": {s: [strip_thinking(strategy.read(t).text) for t in ts] for s, ts in samples.items()},
            }
            for prompt, samples in zip(chunk, drawn, strict=True)
        ]

    with results.store(fingerprint, _GENERATE) as store:
        records = measured(
            store,
            prompts,
            lambda prompt: (prompt.split, _name(prompt)),
            answer,
            at_once=_PROMPTS_AT_ONCE,
            what="noveltybench, generate",
            unit="prompt",
        )
    texts = [[prompt.split, prompt.task_id, prompt.text] for prompt in prompts]
    about = {"checkpoint": results.checkpoint, "fingerprint": fingerprint, "settings": settings, "prompts": texts}
    if results.write:
        write_json(results.directory / GENERATIONS, about)
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
    results = Results(directory, found.about["checkpoint"], write)
    classes = rewards = problem = None
    asked = "partition" in settings.stages
    try:
        check_processes(settings)
        scorer = find_classifier(settings, local_files_only=local_files_only or not asked)
        classes = partition(found, _only_if(asked, scorer), results, threshold=settings.threshold)
        asked = "score" in settings.stages
        scorer = find_reward_model(settings, local_files_only=local_files_only or not asked)
        rewards = score(found, classes, _only_if(asked, scorer), results)
    except UserError as error:
        problem = error if asked else None
    except _NotKeptError:
        pass
    if classes is None and problem is None and "score" in settings.stages:
        problem = UserError(
            "the stage score needs what the stage partition finds with this classifier and threshold; run that first"
        )
    summary = finish(found, classes, rewards, results, settings)
    if problem is not None:
        raise IncompleteError(str(problem), summary)
    return summary


def check_processes(settings: NoveltyBenchConfig) -> None:
    """Refuses scorers in a run of several processes, each of which would load and run its own.

    Raises:
      UserError: with what to run instead.
    """
    scorers = [stage for stage in settings.stages if stage != "generate"]
    if scorers and jax.process_count() > 1:
        stages = ",".join(scorers)
        raise UserError(
            f"the scorers of noveltybench run in one process, and this run has {jax.process_count()}: set "
            "--config.suite.noveltybench.stages=generate here, then repeat the command in a process alone with "
            f"--config.suite.noveltybench.stages={stages}"
        )


def _only_if(asked: bool, scorer: Scorer) -> Scorer:
    """The scorer, or one that must not be needed."""

    def refuse() -> None:
        raise _NotKeptError

    return scorer if asked else replace(scorer, load=refuse)


def partition(found: Generations, scorer: Scorer, results: Results, *, threshold: float) -> list[Record]:
    """The second stage: the class of every answer, for each seed, numbered in the order of their first answers."""
    loaded: list[PairScorer] = []

    def part(chunk: Sequence[Record]) -> list[Record]:
        if not loaded:
            loaded.append(scorer.load())
        return [_partition_record(record, loaded[0], threshold) for record in chunk]

    fingerprint = fingerprint_of(found.about["fingerprint"], scorer.identify(), threshold)
    with results.store(fingerprint, "partition.jsonl") as store:
        return measured(
            store,
            found.records,
            lambda record: (record["split"], record["task_id"]),
            part,
            at_once=1,
            what="noveltybench, partition",
            unit="prompt",
        )


def score(found: Generations, classes: Sequence[Record], scorer: Scorer, results: Results) -> list[Record]:
    """The third stage: the reward of the first answer of every class; a repeat is worth nothing anyway."""
    loaded: list[RewardScorer] = []

    def rate(chunk: Sequence[tuple[NoveltyPrompt, Record, Record]]) -> list[Record]:
        if not loaded:
            loaded.append(scorer.load())
        return [_score_record(*item, loaded[0]) for item in chunk]

    with results.store(fingerprint_of(found.about["fingerprint"], scorer.identify()), "score.jsonl") as store:
        return measured(
            store,
            list(zip(found.prompts, found.records, classes, strict=True)),
            # Other classes have other first answers, so the classes are part of the name.
            lambda item: (item[1]["split"], _score_name(item[1], item[2])),
            rate,
            at_once=1,
            what="noveltybench, score",
            unit="prompt",
        )


def finish(
    found: Generations,
    classes: Sequence[Record] | None,
    rewards: Sequence[Record] | None,
    results: Results,
    settings: NoveltyBenchConfig,
) -> dict[str, Any]:
    """Writes the suite's files from what the stages have found by now.

    Args:
      found: the generations.
      classes: records of the second stage, None where it has not run.
      rewards: records of the third.
      results: where the files go.
      settings: of the suite; those of the scorers are recorded.

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
                per_seed[-1]["utility"] = _utility(sample["classes"], sample["rewards"], settings.patience)
            samples.append(sample)
        for name in per_seed[0] if per_seed else ():
            row[name] = math.fsum(figures[name] for figures in per_seed) / len(per_seed)
        rows.append(row)
    splits = list(dict.fromkeys(prompt.split for prompt in found.prompts))
    figures = {
        "splits": {split: _means([row for row in rows if row["split"] == split]) for split in splits},
        "overall": _means(rows),
    }
    scorers = {name: getattr(settings, name) for name in ("classifier", "threshold", "reward_model", "patience")}
    used = {**found.about["settings"], **scorers}
    return results.finish(SUITE, found.about["fingerprint"], used, figures, rows=rows, samples=samples)


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


def _name(prompt: NoveltyPrompt) -> str:
    """Another text under the same id is another prompt."""
    return f"{prompt.task_id}-{fingerprint_of(prompt.split, prompt.task_id, prompt.text)}"


def _score_name(record: Record, classes: Record) -> str:
    return f"{record['task_id']}-{fingerprint_of(classes['classes'])}"
