"""The retention suite: what a model still knows after calibration, by TinyBenchmarks and the paper's protocol.

Five data sets of 100 questions each: multiple choice by the log-probabilities of the answers, GSM8K by greedy text.
Every question is shown as one user's message in the model's chat template. With the published item parameters, the
accuracy on the whole benchmarks is estimated too. Finished questions are kept, so a killed evaluation resumes where
it stopped and ends with the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.config.suites import RetentionConfig
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.ssot import native_reasoning
from cft_jax.evaluate.store import Record, run_resumable
from cft_jax.evaluate.suites.data_sets import data_set_rows, json_lines
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary
from cft_jax.evaluate.suites.retention import tiny_benchmarks as tiny
from cft_jax.evaluate.suites.retention.item_response import HOW_TO_GET, ItemParameters
from cft_jax.text import ChatOptions
from cft_jax.text.chat import render_chats
from cft_jax.text.tokenizer import fingerprint as tokenizer_fingerprint

SUITE = "retention"
VERSION = 1  # part of every fingerprint: raise it when the same inputs come to other records
# Questions handed to the backend at once, always the same ones together; a killed run repeats at most these.
_EXAMPLES_AT_ONCE = 20


class PromptText:
    """How a question becomes tokens: as the paper does it, thinking off; without a chat template as it stands.

    Args:
      tokenizer: of the model.
      options: of its chat template; not used where it has none.
      duplicate_bos: whether tokenising the rendered text adds the special tokens once more.

    Attributes:
      settings: all that tokens depend on beside the tokenizer.
      thinks: whether the model writes reasoning blocks, which are taken out of its answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions, *, duplicate_bos: bool) -> None:
        template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else None
        self._tokenizer, self._options = tokenizer, replace(options, enable_thinking=False)
        self._add_special_tokens = duplicate_bos or template is None
        self.settings = [asdict(self._options), self._add_special_tokens]
        self.thinks = template is not None and native_reasoning(template) == "tags"

    def text(self, prompt: str) -> str:
        """What the model is shown."""
        if self._tokenizer.chat_template is None:
            return prompt
        return render_chats(self._tokenizer, [[{"role": "user", "content": prompt}]], self._options)[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of such a text."""
        return self._tokenizer.encode(text, add_special_tokens=self._add_special_tokens)

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
    settings = context.config.suite.retention
    examples, items = load_examples(settings), load_items(settings)
    chat = ChatOptions.from_config(context.config.data)
    prompts = PromptText(context.tokenizer, chat, duplicate_bos=settings.duplicate_bos)
    asked = {name: [asdict(example) for example in members] for name, members in examples.items()}
    options = [*prompts.settings, settings.max_new_tokens]
    tokens = tokenizer_fingerprint(context.tokenizer)
    # Where the data lies does not matter, only what it says.
    fingerprint = fingerprint_of(SUITE, VERSION, context.backend.fingerprint, tokens, options, fingerprint_of(asked))
    with context.results.store(fingerprint) as store:
        records = {
            name: run_resumable(
                store,
                members,
                lambda example, name=name: (name, example.example_id),
                lambda chunk, name=name: measure(context, prompts, tiny.TASKS[name], chunk),
                at_once=_EXAMPLES_AT_ONCE,
                what=f"evaluate retention, {name}",
                unit="question",
            )
            for name, members in examples.items()
        }
    rows = task_rows(records, items)
    by_task = {row["task_name"]: _present(row) for row in rows}
    metrics = {"tinybenchmarks": {"tasks": by_task, "aggregate": _present(tiny.aggregate(rows))}}
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


def load_examples(settings: RetentionConfig) -> dict[str, list[tiny.Example]]:
    """The questions of every task asked for.

    Raises:
      UserError: a data set is missing (where it was looked for, and how to get it), or of another form.
    """
    return {name: tiny.TASKS[name].examples(*_rows(tiny.TASKS[name], settings.data)) for name in settings.tasks}


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
    context: SuiteContext, prompts: PromptText, task: tiny.Task, examples: Sequence[tiny.Example]
) -> Iterator[Record]:
    """The records of some questions of a task."""
    names = [{"split": task.name, "task_id": example.example_id} for example in examples]
    if task.metric:
        requests = [prompts.request(*pair) for example in examples for pair in example.scored]
        answers = iter(context.backend.log_likelihoods(requests))
        for name, example in zip(names, examples, strict=True):
            log_probs = [next(answers).log_prob for _ in example.continuations]
            yield name | {"log_probs": log_probs} | tiny.score_choices(example, task.metric, log_probs)
        return
    texts = context.backend.sample(
        [prompts.encode(prompts.text(example.prompt)) for example in examples],
        seeds=[context.config.seed + int(example.example_id[-3:]) for example in examples],
        num_samples=1,
        max_new_tokens=context.config.suite.retention.max_new_tokens,
        temperature=0.0,
        top_p=1.0,
        stop=tiny.STOP_STRINGS,
    )
    for name, example, (text,) in zip(names, examples, texts, strict=True):
        response = tiny.clean_response(text, thinks=prompts.thinks)
        yield name | {"response": response} | tiny.score_response(response, example.target_answer)


def task_rows(records: Mapping[str, Sequence[Record]], items: ItemParameters | None) -> list[dict[str, Any]]:
    """The rows of all tasks, with estimates where there are item parameters."""
    rows = []
    for name, members in records.items():
        task = tiny.TASKS[name]
        own = [tiny.choice_row(task, members)] if task.metric else tiny.response_rows(members)
        columns = ["example_score"] if task.metric else ["strict_correct", "flexible_correct"]
        for row, column in zip(own, columns, strict=True):
            if items is not None:
                estimate = items.estimate(task.benchmark, np.array([float(record[column]) for record in members]))
                row |= {"irt": estimate.irt, "pirt": estimate.pirt, "gpirt": estimate.gpirt}
            rows.append(row)
    return rows


def _rows(task: tiny.Task, data: str) -> tuple[list[dict[str, Any]], str]:
    """A task's rows, and where they were found."""
    source, config, split = task.source
    if data:
        folder = source.partition("/")[2]
        file, directory = (Path(data).expanduser() / name for name in (f"{task.name}.jsonl", folder))
        if file.is_file():
            return [row for _, row in json_lines(file)], str(file)
        if not directory.is_dir():
            raise UserError(
                f"config.suite.retention.data={data!r} holds neither {file.name} nor {folder}/; get it with "
                f"{task.how_to_get} and set the field to tiny, or leave it empty for the hub"
            )
        source = str(directory)
    fix = f"run {task.how_to_get} where there is one and set config.suite.retention.data=tiny"
    return data_set_rows(source, config, split, fix=fix), f"the data set {source}"


def _present(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if value is not None}


def _flat(record: Record) -> dict[str, Any]:
    """A question's row: its single numbers."""
    left_out = ("split", "task_id", "response")
    numbers = {name: v for name, v in record.items() if name not in left_out and not isinstance(v, list)}
    return {"task": record["split"], "example_id": record["task_id"]} | numbers
