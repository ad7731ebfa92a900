"""The NoveltyBench suite (arXiv 2504.05228): how many different answers does a model give, and how good are they?

Three stages, each of which keeps its records in a file and reads what the one before it left: the model generates
answers, a classifier parts them into classes of equivalent ones, a reward model rates the first of each class. So they
can run one after the other, apart (the judges need no model, the model no judges), or be killed and repeated.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_json
from cft_jax.config import Config
from cft_jax.config.suites import NoveltyBenchConfig
from cft_jax.distributions import spread, strip_thinking
from cft_jax.evaluate.metrics import partition_answers, score_list
from cft_jax.evaluate.prompting import draw, prompt_strategy, sampling_config, settings_of
from cft_jax.evaluate.results import fingerprint_of, read_json
from cft_jax.evaluate.store import Key, Record, ResultStore, run_resumable
from cft_jax.evaluate.suites.noveltybench import sources
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary

SUITE = "noveltybench"
VERSION = 1  # part of every fingerprint: raise it when the same inputs come to other records
GENERATIONS = "generations.json"
_GENERATE = "generate.jsonl"
_PROMPTS_AT_ONCE = 8

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Generations:
    """What the first stage left, which the others read: `about` is the contents of `generations.json`."""

    about: Mapping[str, Any]
    prompts: Sequence[sources.NoveltyPrompt]
    records: Sequence[Record]

    @classmethod
    def read(cls, directory: Path) -> "Generations":
        """Reads a directory; a `UserError` where the first stage has not finished."""
        about = read_json(directory / GENERATIONS)
        if about is None:
            raise UserError(
                f"{directory} holds no finished generations ({GENERATIONS}); run the stage generate first: "
                "--config.suite.noveltybench.stages=generate"
            )
        prompts = [sources.NoveltyPrompt(*row) for row in about["prompts"]]
        with ResultStore(directory / _GENERATE, fingerprint=about["fingerprint"], write=False) as store:
            records = [store[_key(prompt)] for prompt in prompts]
        return cls(about, prompts, records)


def needs_model(config: Config) -> bool:
    """Whether the first stage runs."""
    return "generate" in config.suite.noveltybench.stages


def check(config: Config, directory: Path) -> None:
    """See `Suite.check`."""
    settings, local = config.suite.noveltybench, config.model.local_files_only
    _check_processes(settings)
    if needs_model(config):
        sources.read_novelty_prompts(settings)
        sampling_config(config, settings.num_samples)
    else:
        Generations.read(directory)
    for stage, find in (("partition", sources.find_classifier), ("score", sources.find_reward_model)):
        if stage in settings.stages:
            find(settings, local_files_only=local)


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`: the stages asked for; others count where they have finished earlier, with the same judges."""
    settings = context.config.suite.noveltybench
    generations = generate(context) if needs_model(context.config) else Generations.read(context.results.directory)
    classes = rewards = None
    incomplete = ""
    try:
        _check_processes(settings)
        classes = partition(context, generations)
        if classes is not None:
            rewards = score(context, generations, classes)
        elif "score" in settings.stages:
            incomplete = (
                "the stage score needs what the stage partition finds with this classifier and threshold; "
                "run that first"
            )
    except UserError as error:
        incomplete = str(error)
    metrics, rows, samples = summarise(generations, classes, rewards, settings.patience)
    metrics |= {"incomplete": incomplete} if incomplete else {}
    judges = {name: getattr(settings, name) for name in ("classifier", "threshold", "reward_model", "patience")}
    used = {**generations.about["settings"], **judges}
    results = replace(context.results, checkpoint=generations.about["checkpoint"])
    return results.finish(SUITE, generations.about["fingerprint"], used, metrics, rows=rows, samples=samples)


def generate(context: SuiteContext) -> Generations:
    """The first stage: answers of the model to every prompt."""
    config, results, settings = context.config, context.results, context.config.suite.noveltybench
    strategy = prompt_strategy(config, context.tokenizer, mode="open", max_new_tokens=settings.max_new_tokens)
    sampling, prompts = sampling_config(config, settings.num_samples), _prompts(config)
    asked = settings_of(strategy, sampling)
    fingerprint = fingerprint_of(SUITE, VERSION, context.backend.fingerprint, strategy.name, asked)

    def answer(chunk: Sequence[sources.NoveltyPrompt]) -> Iterator[Record]:
        tokens = [strategy.encode([{"role": "user", "content": prompt.text}]) for prompt in chunk]
        names = [_key(prompt) for prompt in chunk]
        drawn = draw(context.backend, strategy, sampling, tokens, [f"{SUITE}/{name}" for _, name in names])
        for (split, name), samples in zip(names, drawn, strict=True):
            answers = {s: [strip_thinking(strategy.read(text).text) for text in texts] for s, texts in samples.items()}
            yield {"split": split, "task_id": name, "samples": samples, "answers": answers}

    with results.store(fingerprint, _GENERATE) as store:
        what = "noveltybench, generate"
        records = run_resumable(store, prompts, _key, answer, at_once=_PROMPTS_AT_ONCE, what=what, unit="prompt")
    texts = [[prompt.split, prompt.task_id, prompt.text] for prompt in prompts]
    about = {"checkpoint": results.checkpoint, "fingerprint": fingerprint, "settings": asked, "prompts": texts}
    if results.write:
        write_json(results.directory / GENERATIONS, about)
    return Generations(about, prompts, records)


def partition(context: SuiteContext, generations: Generations) -> list[Record] | None:
    """The second stage: the class of every answer, for each seed, numbered in the order of their first answers.

    Returns:
      A record per prompt; None where the stage is not asked for and has not finished earlier with this classifier.

    Raises:
      UserError: the stage is asked for and the classifier is missing.
    """
    threshold = context.config.suite.noveltybench.threshold

    def part(record: Record, judge: Any) -> Record:
        found = {
            seed: partition_answers(answers, judge, threshold=threshold) for seed, answers in record["answers"].items()
        }
        return {
            "classes": {seed: list(partition.classes) for seed, partition in found.items()},
            "classifier_pairs": sum(partition.num_classifier_pairs for partition in found.values()),
        }

    items = {(record["split"], record["task_id"]): record for record in generations.records}
    return _judged("partition", context, generations, sources.find_classifier, items, part, threshold)


def score(context: SuiteContext, generations: Generations, classes: Sequence[Record]) -> list[Record] | None:
    """The third stage, as `partition`: the reward of the first answer of every class; a repeat is worth nothing."""

    def rate(item: tuple[sources.NoveltyPrompt, Record, Record], judge: Any) -> Record:
        prompt, record, own = item
        rewards: dict[str, list[float | None]] = {}
        for seed, answers in record["answers"].items():
            numbers = own["classes"][seed]
            first = [numbers.index(number) for number in range(len(set(numbers)))]
            rated = dict(zip(first, judge(prompt.text, [answers[index] for index in first]), strict=True))
            # JSON has no NaN; one counts like a missing reward, as the lowest.
            finite = {index: float(reward) for index, reward in rated.items() if math.isfinite(reward)}
            rewards[seed] = [finite.get(index) for index in range(len(answers))]
        return {"rewards": rewards}

    # Other classes have other first answers, so the classes are part of the name.
    items = {
        (record["split"], f"{record['task_id']}-{fingerprint_of(own['classes'])}"): (prompt, record, own)
        for prompt, record, own in zip(generations.prompts, generations.records, classes, strict=True)
    }
    return _judged("score", context, generations, sources.find_reward_model, items, rate)


def summarise(
    generations: Generations, classes: Sequence[Record] | None, rewards: Sequence[Record] | None, patience: float
) -> tuple[dict[str, Any], list[Record], list[Record]]:
    """What the stages have found by now; `classes` and `rewards` are None where their stages have not run.

    Returns:
      `splits` and `overall` of the summary, each with `mean_distinct` after the second stage and `mean_utility` after
      the third; rows of the table; lines of the samples.
    """
    rows: list[Record] = []
    samples: list[Record] = []
    for index, (prompt, record) in enumerate(zip(generations.prompts, generations.records, strict=True)):
        row: Record = {"split": prompt.split, "task_id": prompt.task_id, "prompt": prompt.text}
        per_seed: list[dict[str, float]] = []
        for seed, texts in record["samples"].items():
            sample = row | {"seed": int(seed), "samples": texts, "answers": record["answers"][seed]}
            metrics: dict[str, float] = {}
            if classes is not None:
                sample["classes"] = classes[index]["classes"][seed]
                metrics["distinct"] = len(set(sample["classes"]))
            if classes is not None and rewards is not None:
                sample["rewards"] = rewards[index]["rewards"][seed]
                raw = [math.nan if reward is None else reward for reward in sample["rewards"]]
                metrics["utility"] = score_list(sample["classes"], raw, patience=patience).utility
            samples.append(sample)
            per_seed.append(metrics)
        rows.append(row | {name: math.fsum(m[name] for m in per_seed) / len(per_seed) for name in per_seed[0]})
    splits = dict.fromkeys(prompt.split for prompt in generations.prompts)
    by_split = {split: _means([row for row in rows if row["split"] == split]) for split in splits}
    return {"splits": by_split, "overall": _means(rows)}, rows, samples


def _means(rows: Sequence[Record]) -> dict[str, float | int]:
    means: dict[str, float | int] = {"num_prompts": len(rows)}
    for name in ("distinct", "utility"):
        if rows and name in rows[0]:
            means[f"mean_{name}"] = math.fsum(row[name] for row in rows) / len(rows)
    return means


def _judged(
    stage: str,
    context: SuiteContext,
    generations: Generations,
    find: Callable[..., sources.Judge],
    items: Mapping[Key, _Item],
    judge_one: Callable[[_Item, Any], Record],
    *settings_read: Any,
) -> list[Record] | None:
    """The records of a judge's stage; None where it is not asked for and has not judged all items earlier."""
    settings, local = context.config.suite.noveltybench, context.config.model.local_files_only
    asked = stage in settings.stages
    if not asked and jax.process_count() > 1:
        return None  # hosts may have different judges at hand, and must agree on the stages that they read
    try:
        judge = find(settings, local_files_only=local or not asked)
    except UserError:
        if asked:
            raise
        return None
    load = functools.cache(judge.load)  # not before an item is missing

    def measure(keys: Sequence[Key]) -> Iterator[Record]:
        for split, name in keys:
            yield {"split": split, "task_id": name} | judge_one(items[split, name], load())

    fingerprint = fingerprint_of(generations.about["fingerprint"], judge.identify(), *settings_read)
    with context.results.store(fingerprint, f"{stage}.jsonl") as store:
        if not asked:
            return [store[key] for key in items] if all(key in store for key in items) else None
        what = f"noveltybench, {stage}"
        return run_resumable(store, list(items), lambda key: key, measure, at_once=1, what=what, unit="prompt")


def _check_processes(settings: NoveltyBenchConfig) -> None:
    """Refuses judges in a run of several processes, each of which would load and run its own."""
    judging = [stage for stage in settings.stages if stage != "generate"]
    if judging and jax.process_count() > 1:
        raise UserError(
            f"the judges of noveltybench run in one process, and this run has {jax.process_count()}: set "
            "--config.suite.noveltybench.stages=generate here, then repeat the command in a process alone with "
            f"--config.suite.noveltybench.stages={','.join(judging)}"
        )


def _prompts(config: Config) -> list[sources.NoveltyPrompt]:
    """The prompts of each split, or some of them."""
    prompts = sources.read_novelty_prompts(config.suite.noveltybench)
    limit = config.eval.max_prompts_per_split or len(prompts)
    splits = dict.fromkeys(prompt.split for prompt in prompts)
    by_split = [[prompt for prompt in prompts if prompt.split == split] for split in splits]
    return [prompt for members in by_split for prompt in spread(members, limit, lambda _: "")]


def _key(prompt: sources.NoveltyPrompt) -> Key:
    """Another text under the same id is another prompt."""
    return prompt.split, f"{prompt.task_id}-{fingerprint_of(prompt.split, prompt.task_id, prompt.text)}"
