"""The suite of questions that are not about chance: does the model still know what its base knew? Needs no download.

The questions are the package's own (`cft_jax.distributions.questions`). The half whose prompts `train.keep` asks by
default and the other one are told apart: only the other shows what is kept beyond the kept texts themselves.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cft_jax.config import Config
from cft_jax.distributions.questions import Question, questions
from cft_jax.distributions.splits import spread
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.store import Record, run_resumable
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary
from cft_jax.text import ChatOptions, encode_chats, terminator_id
from cft_jax.text.tokenizer import encode_strings

SUITE = "questions"
VERSION = 1  # part of every fingerprint: raise it when the same inputs come to other records
KEPT, OTHERS = "kept", "others"
# The topic whose answers are texts, of which the likelihood tells more than whether they are repeated to the letter.
TEXTS = "texts"
_QUESTIONS_AT_ONCE = 256


def check(config: Config, _: Path) -> None:
    """See `Suite.check`: nothing is needed."""


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`."""
    data, tokenizer, backend = context.config.data, context.tokenizer, context.backend
    options, end = ChatOptions.from_config(data), terminator_id(context.tokenizer, data.terminator)
    asked = questions()
    if limit := context.config.suite.questions.num_questions:
        asked = spread(asked, limit, lambda question: f"{question.topic} {question.kept}")
    messages = [[{"role": "user", "content": question.prompt}] for question in asked]
    prompts = encode_chats(tokenizer, messages, options)
    answers = [[*ids, end] for ids in encode_strings(tokenizer, [question.answer for question in asked])]
    fingerprint = fingerprint_of(SUITE, VERSION, backend.fingerprint, prompts, answers)

    def measure(numbers: Sequence[int]) -> list[Record]:
        found = backend.log_likelihoods([(prompts[n], answers[n]) for n in numbers])
        return [
            _record(asked[n], {"log_prob": one.log_prob, "is_right": one.greedy, "num_tokens": len(answers[n])})
            for n, one in zip(numbers, found, strict=True)
        ]

    with context.results.store(fingerprint) as store:
        records = run_resumable(
            store,
            range(len(asked)),
            lambda n: (SUITE, asked[n].prompt),
            measure,
            at_once=_QUESTIONS_AT_ONCE,
            what="evaluate questions",
            unit="question",
        )
    return context.results.finish(SUITE, fingerprint, {}, summarise(records), rows=records, samples=[])


def _record(question: Question, measured: dict[str, Any]) -> Record:
    half = KEPT if question.kept else OTHERS
    return {"split": SUITE, "task_id": question.prompt, "topic": question.topic, "half": half, **measured}


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """The suite's metrics from its records.

    Returns:
      By half of the questions `num_questions`; `accuracy`, the share of answers of which every token is the model's
      most probable one; `probability`, the mean probability of the right answer; and `nats_per_token` of the texts,
      which the other three leave out. And the four by topic and half.
    """
    halves: dict[str, list[Record]] = defaultdict(list)
    topics: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        halves[record["half"]].append(record)
        topics[record["topic"]][record["half"]].append(record)
    summary = {}
    for half in (KEPT, OTHERS):
        texts = [record for record in halves[half] if record["topic"] == TEXTS]
        short = [record for record in halves[half] if record["topic"] != TEXTS]
        summary[half] = _metrics(short) | {"nats_per_token": _metrics(texts)["nats_per_token"]}
    by_topic = {name: {half: _metrics(of_half) for half, of_half in found.items()} for name, found in topics.items()}
    return {"halves": summary, "topics": by_topic}


def _metrics(records: Sequence[Record]) -> dict[str, float | int]:
    count = len(records)
    return {
        "num_questions": count,
        "accuracy": sum(record["is_right"] for record in records) / count,
        "probability": math.fsum(math.exp(record["log_prob"]) for record in records) / count,
        "nats_per_token": -math.fsum(r["log_prob"] for r in records) / sum(r["num_tokens"] for r in records),
    }
