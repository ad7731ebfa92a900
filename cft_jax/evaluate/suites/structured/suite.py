"""The structured-sampling suite: does the model answer with the distribution it is asked for?

For every prompt: the exact metrics of the model's whole distribution over the answers, the paper's path KL, and the
metrics of sampled answers. Each finished prompt is kept, so a killed evaluation resumes where it stopped and ends with
the same numbers.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.distributions import configured_tasks
from cft_jax.distributions.tasks import Task, digest_of_tasks
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.prompting import PromptStrategy, SamplingConfig, draw, prompt_strategy
from cft_jax.evaluate.results import STORE, Results, fingerprint_of, read_summary
from cft_jax.evaluate.ssot import ReadAnswer
from cft_jax.evaluate.store import Record, read_records, run_resumable
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary
from cft_jax.evaluate.suites.structured import prompt_metrics
from cft_jax.evaluate.suites.structured.aggregate import SECTIONS, summarise_split
from cft_jax.evaluate.suites.structured.plan import paper_path_kl, plan_of, task_rng
from cft_jax.evaluate.suites.structured.settings import (
    Messages,
    PromptCodec,
    StructuredSettings,
    evaluation_tasks,
    prompt_codec,
    structured_settings,
)
from cft_jax.text.values import check_values

SUITE = "structured"
VERSION = 3  # part of every fingerprint: raise it when the same inputs come to other records
# Prompts handed to the backend at once; a killed run repeats at most these.
_PROMPTS_AT_ONCE = 8


def check(config: Config, _: Path) -> None:
    """See `Suite.check`."""
    evaluation_tasks(config, configured_tasks(config.data))


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`."""
    config, tokenizer = context.config, context.tokenizer
    tasks = evaluation_tasks(config, configured_tasks(config.data))
    check_values(tokenizer, tasks)
    strategy = None
    if config.eval.method != "direct":
        strategy = prompt_strategy(config, tokenizer, mode="numeric", max_new_tokens=0)
    codec, settings = prompt_codec(tokenizer, config.data), structured_settings(config)
    return run_structured(context.backend, codec, tasks, settings, context.results, strategy)


def run_structured(
    backend: Backend,
    codec: PromptCodec,
    tasks: Sequence[Task],
    settings: StructuredSettings,
    results: Results,
    strategy: PromptStrategy | None = None,
) -> Summary:
    """Measures every task and returns the summary; a killed run resumes where it stopped.

    Args:
      backend: the model.
      codec: its tokens.
      tasks: prompts of one or several splits, in order.
      settings: what is measured.
      results: where the files go.
      strategy: another way to ask than by the tasks' own messages; of it only samples are measured, since the model's
        answer is then no longer the first thing it writes.

    Raises:
      UserError: the batch protocol has no prompt for one of them.
    """
    method = [] if strategy is None else [strategy.name]
    asked = digest_of_tasks(tasks)
    fingerprint = fingerprint_of(SUITE, VERSION, backend.fingerprint, codec.name, asdict(settings), asked, *method)
    shown = _shown(tasks)
    with results.store(fingerprint) as store:
        records = run_resumable(
            store,
            tasks,
            lambda task: (task.split, task.task_id),
            lambda chunk: _measure(backend, codec, chunk, settings, shown, strategy),
            at_once=_PROMPTS_AT_ONCE,
            what="evaluate structured",
            unit="prompt",
        )
    splits: dict[str, list[Record]] = defaultdict(list)
    rows, samples = [], []
    for record in records:
        splits[record["split"]].append(record)
        name = {"split": record["split"], "task_id": record["task_id"]}
        metrics = {
            f"{section}.{metric}": value
            for section in (*SECTIONS, "estimate", "tests", "paper_gof")
            for metric, value in record.get(section, {}).items()
        }
        rows.append({"split": record["split"], "family": record["group"], "task_id": record["task_id"]} | metrics)
        samples += [name | {"seed": int(seed), "samples": texts} for seed, texts in record.get("samples", {}).items()]
    protocol = "independent" if settings.numbers_per_completion == 1 else "batch"
    summary = {
        "protocol": protocol if strategy is None else strategy.method,
        "splits": {name: summarise_split(members, settings.num_samples) for name, members in splits.items()},
    }
    return results.finish(SUITE, fingerprint, asdict(settings), summary, rows=rows, samples=samples)


def read_results(directory: Path) -> tuple[dict[str, Any], list[Record]] | None:
    """The summary and the records that `run_structured` left in a directory; None where there is no summary.

    Raises:
      UserError: a file is damaged.
    """
    summary = read_summary(directory)
    if summary is None:
        return None
    return summary, read_records(directory / STORE, summary["fingerprint"])


def _measure(
    backend: Backend,
    codec: PromptCodec,
    tasks: Sequence[Task],
    settings: StructuredSettings,
    shown: frozenset[tuple[str, str]],
    strategy: PromptStrategy | None,
) -> list[Record]:
    """The records of a few tasks; a record does not depend on which other tasks are measured with it."""
    per_completion, resolution, seed = settings.numbers_per_completion, settings.resolution, settings.seeds[0]
    asked = strategy or PromptStrategy(
        "direct",
        codec.encode,
        lambda text: ReadAnswer(text, False),
        settings.max_new_tokens * per_completion,
        codec.name,
    )
    prompts = [asked.encode(_messages(task, per_completion)) for task in tasks]
    records: list[Record] = [
        {"split": task.split, "task_id": task.task_id, "group": task.group, "weight": task.weight} for task in tasks
    ]
    if per_completion == 1 and strategy is None:
        plans = [plan_of(task, codec, resolution, seed) for task in tasks]
        scores = backend.score(prompts, [plan.trie for plan in plans], prefixes=None)
        for record, plan, score in zip(records, plans, scores, strict=True):
            is_shown = (record["split"], record["task_id"]) in shown
            record |= plan.sections(score, codec.text_of, keep_distribution=is_shown)
        for i, path_kl in paper_path_kl(backend, prompts, tasks, codec, resolution, seed).items():
            records[i]["path"] = prompt_metrics.finite({"logit_kl": path_kl}) | records[i]["path"]
    if not settings.num_samples:
        return records
    completions = -(-settings.num_samples // per_completion)
    sampling = SamplingConfig(completions, settings.seeds, settings.temperature, settings.top_p)
    drawn = draw(backend, asked, sampling, prompts, [f"{task.split}/{task.task_id}" for task in tasks])
    for record, task, samples in zip(records, tasks, drawn, strict=True):
        target = prompt_metrics.target_of_task(task, resolution.grid.num_decimals)
        sections = []
        for seed in settings.seeds:
            read = [asked.read(text) for text in samples[str(seed)]]
            texts = [answer.text for answer in read]
            answers = prompt_metrics.read_answers(texts, task, per_completion=per_completion)
            section = prompt_metrics.sampled_section(answers, task, target, task_rng(task, seed, "figures"))
            if degraded := sum(answer.degraded for answer in read):
                section["lenient_parses"]["without_answer_tag"] = degraded
            sections.append(section)
        record |= prompt_metrics.mean_sections(sections) | {"samples": samples}
    return records


def _messages(task: Task, per_completion: int) -> Messages:
    """The task's messages, which the batch protocol asks for several numbers at once."""
    if per_completion == 1:
        return task.messages
    content = task.messages[-1]["content"]
    one, output = "exactly ONE random number", "Output ONLY the number."
    if one not in content or output not in content:
        raise UserError(
            f"task {task.task_id} is not one of the families' prompts, which alone can ask for several numbers; "
            "set config.eval.numbers_per_completion=1"
        )
    content = content.replace(one, f"exactly {per_completion} random numbers")
    content = content.replace(output, "Output ONLY the numbers, separated by commas.")
    return [*task.messages[:-1], {"role": "user", "content": content}]


def _shown(tasks: Sequence[Task]) -> frozenset[tuple[str, str]]:
    """The tasks whose whole distribution is kept for plots: the middle one of every family in every split."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for task in tasks:
        groups[task.split, task.group].append(task.task_id)
    return frozenset((split, members[len(members) // 2]) for (split, _), members in groups.items())
