"""The retention suite: what a model still knows after calibration, by TinyBenchmarks and the paper's protocol.

Five data sets of 100 questions each: multiple choice by the log-probabilities of the answers, GSM8K by greedy text.
Every question is shown as one user's message in the model's chat template. With the published item parameters, the
accuracy on the whole benchmarks is estimated too. Finished questions are kept, so a killed evaluation resumes where
it stopped and ends with the same numbers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.config.suites import RetentionConfig
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.ssot import native_reasoning
from cft_jax.evaluate.store import Record, run_resumable
from cft_jax.evaluate.suites.hub_rows import data_set_rows
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary
from cft_jax.evaluate.suites.retention.item_response import HOW_TO_GET, NUM_SCORES, ItemParameters
from cft_jax.evaluate.suites.retention.tiny_benchmarks import (
    STOP_STRINGS,
    TASKS,
    Example,
    Task,
    aggregate,
    choice_row,
    clean_response,
    response_rows,
    score_choices,
    score_response,
)
from cft_jax.text import ChatOptions
from cft_jax.text.chat import render_chats
from cft_jax.text.tokenizer import fingerprint as tokenizer_fingerprint

SUITE = "retention"
VERSION = 1  # part of every fingerprint: raise it when the same inputs come to other records
# Questions handed to the backend at once, always the same ones together; a killed run repeats at most these.
_EXAMPLES_AT_ONCE = 20


@dataclass(frozen=True)
class PromptText:
    """How a question becomes tokens.

    Attributes:
      tokenizer: of the model.
      options: of its chat template; not used where it has none.
      add_special_tokens: whether tokenising the rendered text adds the special tokens (once more).
      thinks: whether the model writes reasoning blocks, which are taken out of its answers.
    """

    tokenizer: PreTrainedTokenizerBase
    options: ChatOptions
    add_special_tokens: bool
    thinks: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, options: ChatOptions, *, duplicate_bos: bool) -> "PromptText":
        """As the paper does it: thinking off; without a chat template the question as it stands."""
        template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else None
        return cls(
            tokenizer,
            replace(options, enable_thinking=False),
            duplicate_bos or template is None,
            template is not None and native_reasoning(template) == "tags",
        )

    def text(self, prompt: str) -> str:
        """What the model is shown."""
        if self.tokenizer.chat_template is None:
            return prompt
        return render_chats(self.tokenizer, [[{"role": "user", "content": prompt}]], self.options)[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of such a text."""
        ids = self.tokenizer(text, add_special_tokens=self.add_special_tokens, return_attention_mask=False)["input_ids"]
        assert isinstance(ids, list)
        return ids

    def request(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation of a question's answer.

        The joined text is tokenised, and what follows as many tokens as the context alone has is the continuation: a
        token that crosses the seam counts as context.

        Raises:
          UserError: no token is left to be scored, or none to predict it from.
        """
        text = self.text(prompt)
        count, ids = len(self.encode(text)), self.encode(text + continuation)
        if not 0 < count < len(ids):
            raise UserError(
                f"the answer {continuation!r} after {prompt[-40:]!r} is no token of its own; a chat template would "
                "separate them, so use an instruction-tuned checkpoint or set config.model.tokenizer"
            )
        return ids[:count], ids[count:]


def check(config: Config, _: Path) -> None:
    """See `Suite.check`."""
    if config.tasks:
        _lm_eval()
    else:
        load_examples(config.suite.retention)
        load_items(config.suite.retention)


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`; with `config.tasks` those tasks of lm-eval instead of TinyBenchmarks.

    `per_prompt.csv` has a row per question, `samples.jsonl.gz` its scores or its answer.
    """
    if context.config.tasks:
        return _lm_eval().run_lm_eval(context)
    settings, seed = context.config.suite.retention, context.config.seed
    examples, items = load_examples(settings), load_items(settings)
    chat = ChatOptions.from_config(context.config.data)
    prompts = PromptText.of(context.tokenizer, chat, duplicate_bos=settings.duplicate_bos)
    asked = {name: [asdict(example) for example in members] for name, members in examples.items()}
    options = [asdict(prompts.options), prompts.add_special_tokens, settings.max_new_tokens]
    tokens = tokenizer_fingerprint(context.tokenizer)
    # Where the data lies does not matter, only what it says.
    fingerprint = fingerprint_of(SUITE, VERSION, context.backend.fingerprint, tokens, options, fingerprint_of(asked))
    records: dict[str, list[Record]] = {}
    with context.results.store(fingerprint) as store:
        for name, members in examples.items():
            records[name] = run_resumable(
                store,
                members,
                lambda example, name=name: (name, example.example_id),
                lambda chunk, name=name: measure(context.backend, prompts, TASKS[name], chunk, settings, seed),
                at_once=_EXAMPLES_AT_ONCE,
                what=f"evaluate retention, {name}",
                unit="question",
            )
    rows = task_rows(records, items)
    by_task = {row["task_name"]: _present(row) for row in rows}
    metrics = {"tinybenchmarks": {"tasks": by_task, "aggregate": _present(aggregate(rows))}}
    everything = [record for members in records.values() for record in members]
    flat = [_flat(record) for record in everything]
    return context.results.finish(SUITE, fingerprint, asdict(settings), metrics, rows=flat, samples=everything)


def _lm_eval() -> Any:
    """The adapter, whose library is an extra."""
    try:
        from cft_jax.evaluate.suites.retention import lm_eval_tasks
    except ImportError as error:
        raise UserError(f"config.tasks needs lm-eval ({error}): pip install -e '.[eval]'") from error
    return lm_eval_tasks


def load_examples(settings: RetentionConfig) -> dict[str, list[Example]]:
    """The questions of every task asked for.

    Raises:
      UserError: a data set is missing (where it was looked for, and how to get it), or of another form.
    """
    found = {}
    for name in settings.tasks:
        task = TASKS[name]
        rows, place = _rows(task, settings.data)
        found[name] = task.examples(rows, place)
    return found


def load_items(settings: RetentionConfig) -> ItemParameters | None:
    """The item parameters; None, with a word about it, where none are configured.

    Raises:
      UserError: the file named is missing or damaged.
    """
    if settings.item_parameters:
        return ItemParameters.load(Path(settings.item_parameters).expanduser())
    logging.info("no item parameters, so no gp-IRT estimates; %s", HOW_TO_GET)
    return None


def measure(
    backend: Backend,
    prompts: PromptText,
    task: Task,
    examples: Sequence[Example],
    settings: RetentionConfig,
    seed: int,
) -> Iterator[Record]:
    """The records of some questions of a task."""
    names = [{"split": task.name, "task_id": example.example_id} for example in examples]
    if not task.metric:
        texts = backend.sample(
            [prompts.encode(prompts.text(example.prompt)) for example in examples],
            seeds=[seed + int(example.example_id[-3:]) for example in examples],
            num_samples=1,
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            stop=STOP_STRINGS,
        )
        for name, example, (text,) in zip(names, examples, texts, strict=True):
            response = clean_response(text, thinks=prompts.thinks)
            yield name | {"response": response} | score_response(response, example.target_answer)
        return
    requests = [
        prompts.request(context, continuation)
        for example in examples
        for context, continuation in zip(_contexts(example), example.continuations, strict=True)
    ]
    answers = iter(backend.log_likelihoods(requests))
    for name, example in zip(names, examples, strict=True):
        log_probs = [next(answers).log_prob for _ in example.continuations]
        yield name | {"log_probs": log_probs} | score_choices(example, task.metric, log_probs)


def task_rows(records: Mapping[str, Sequence[Record]], items: ItemParameters | None) -> list[dict[str, Any]]:
    """The rows of all tasks, with estimates where there are item parameters and as many scores as they need."""
    rows = []
    for name, members in records.items():
        task = TASKS[name]
        own = [choice_row(task, members)] if task.metric else response_rows(members)
        columns = ["example_score"] if task.metric else ["strict_correct", "flexible_correct"]
        for row, column in zip(own, columns, strict=True):
            scores = np.array([float(record[column]) for record in members])
            if items is not None and scores.size == NUM_SCORES:
                estimate = items.estimate(task.benchmark, scores)
                row |= {"irt": estimate.irt, "pirt": estimate.pirt, "gpirt": estimate.gpirt}
            rows.append(row)
    return rows


def _contexts(example: Example) -> tuple[str, ...]:
    return example.contexts or (example.prompt,) * len(example.continuations)


def _rows(task: Task, data: str) -> tuple[list[dict[str, Any]], str]:
    """A task's rows, and where they were found."""
    source, config, split = task.source
    folder = source.partition("/")[2]
    fix = f"run {task.how_to_get} where there is one and set config.suite.retention.data=tiny"
    if not data:
        return data_set_rows(source, config or None, split, fix=fix), f"the data set {source}"
    root = Path(data).expanduser()
    file, directory = root / f"{task.name}.jsonl", root / folder
    if file.is_file():
        try:
            return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line], str(file)
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); copy it again, or get it with {task.how_to_get}") from error
    if directory.is_dir():
        return data_set_rows(str(directory), config or None, split, fix=fix), str(directory)
    raise UserError(
        f"config.suite.retention.data={data!r} holds neither {file.name} nor {folder}/; get it with {task.how_to_get} "
        "and set the field to tiny, or leave it empty for the hub"
    )


def _present(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What was computed."""
    return {name: value for name, value in metrics.items() if value is not None}


def _flat(record: Record) -> dict[str, Any]:
    """A question's row: its single numbers."""
    named = {"task": record["split"], "example_id": record["task_id"]}
    return named | {
        name: value
        for name, value in record.items()
        if name not in ("split", "task_id", "response") and not isinstance(value, list)
    }
