"""TinyBenchmarks by the paper's protocol: rows of the data sets become examples, scores and answers become metrics.

`tests/golden/RETENTION.md` describes the protocol. Pure functions; the suite is `suite.py`.
"""

import decimal
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cft_jax.common.errors import UserError
from cft_jax.distributions import strip_thinking

NUM_EXAMPLES = 100
STRICT, FLEXIBLE = "tiny_gsm8k_strict", "tiny_gsm8k_flexible"
STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
# Looked for by the joining rule; other white space does not count.
_BLANKS = (" ", "\n", "\t")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_MARKED = re.compile(r"####\s*([^\n\r]*)")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      example_id: task and number of the row.
      prompt: what the model is shown.
      choices: texts of the answers, whose lengths normalise scores; empty for GSM8K.
      continuations: what is scored of each choice.
      contexts: a prompt for each choice, where they differ; else empty.
      correct: index of the right choice, the first of several.
      target_scores: of the choices; empty but for TruthfulQA.
      target_answer: GSM8K's answer; empty for the others.
    """

    example_id: str
    prompt: str
    choices: tuple[str, ...] = ()
    continuations: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    correct: int = 0
    target_scores: tuple[float, ...] = ()
    target_answer: str = ""

    @property
    def scored(self) -> list[tuple[str, str]]:
        """The context of every choice and its continuation."""
        contexts = self.contexts or (self.prompt,) * len(self.continuations)
        return list(zip(contexts, self.continuations, strict=True))


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      name: its own.
      benchmark: name of its item parameters.
      source: data set on the hub, its configuration and its split.
      metric: "acc", "acc_norm", "mc2" or "" (GSM8K).
      read: a row → the fields of its example beside id and prompt, the continuations not yet joined to their contexts.
      columns: exactly those of every row.
    """

    name: str
    benchmark: str
    source: tuple[str, str | None, str]
    metric: str
    read: Callable[[Row], dict[str, Any]]
    columns: set[str]

    @property
    def how_to_get(self) -> str:
        """The command that gets the data set into a directory of local data."""
        source = self.source[0]
        return f"`hf download {source} --repo-type dataset --local-dir tiny/{source.partition('/')[2]}`"

    def examples(self, rows: Sequence[Row], place: str) -> list[Example]:
        """The examples of a data set.

        Raises:
          UserError: the data set, found at `place`, is not the published one in form.
        """
        fix = f"get it anew with {self.how_to_get}"
        if len(rows) != NUM_EXAMPLES:
            raise UserError(f"{place} has {len(rows)} rows; {self.name} has exactly {NUM_EXAMPLES}; {fix}")
        if set(rows[0]) != self.columns:
            columns = f"{place} has the columns {sorted(rows[0])}; {self.name} takes {sorted(self.columns)}"
            raise UserError(f"{columns}; {fix}")
        found = []
        for number, row in enumerate(rows):
            try:
                found.append(self.example(row, number))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(f"{place}, row {number} cannot be read as {self.name}: {error}; {fix}") from error
        return found

    def example(self, row: Row, number: int) -> Example:
        """One row's example; `ValueError` where the row breaks a rule of the task."""
        example = Example(f"{self.name}_{number:03d}", row["input_formatted"], **self.read(row))
        return replace(example, continuations=tuple(_joined(*pair) for pair in example.scored))


def _joined(context: str, continuation: str) -> str:
    """The continuation with a blank before it, unless there is one at either side of the seam."""
    if not continuation:
        raise ValueError("an answer is empty")
    return continuation if continuation.startswith(_BLANKS) or context.endswith(_BLANKS) else f" {continuation}"


def _mmlu(row: Row) -> dict[str, Any]:
    choices, answer = tuple(row["choices"]), int(row["answer"])
    if not 0 <= answer < len(choices) <= len(string.ascii_uppercase):
        raise ValueError(f"answer {answer} of {len(choices)} choices")
    return {"choices": choices, "continuations": tuple(string.ascii_uppercase[: len(choices)]), "correct": answer}


def _hellaswag(row: Row) -> dict[str, Any]:
    endings, label = tuple(_cleaned_ending(ending) for ending in row["endings"]), int(row["label"])
    if not 0 <= label < len(endings):
        raise ValueError(f"label {label} of {len(endings)} endings")
    return {"choices": endings, "continuations": endings, "correct": label}


def _cleaned_ending(text: str) -> str:
    """HellaSwag's endings without their marks, by the paper's rules (and their leftovers)."""
    text = text.strip().replace(" [title]", ". ")
    while (start := text.find("[")) >= 0 and (end := text.find("]", start)) >= 0:
        text = text[:start] + text[end + 1 :]
    return text.replace("  ", " ")


def _truthfulqa(row: Row) -> dict[str, Any]:
    for name in ("mc1_targets", "mc2_targets"):
        if set(row[name]) != {"choices", "labels"}:
            raise ValueError(f"{name} holds {sorted(row[name])}, not choices and labels")
    choices, scores = tuple(row["mc2_targets"]["choices"]), tuple(map(float, row["mc2_targets"]["labels"]))
    return {"choices": choices, "continuations": choices, "correct": scores.index(1.0), "target_scores": scores}


def _winogrande(row: Row) -> dict[str, Any]:
    prompt, options, right = row["input_formatted"], (row["option1"], row["option2"]), row["answer"]
    if right not in ("1", "2"):
        raise ValueError(f"answer {right!r} is neither '1' nor '2'")
    correct = int(right) - 1
    if not prompt.endswith(options[correct]):
        raise ValueError("the prompt does not end with the right option")
    # The longer option is tried first, even where the shorter one is right.
    tail = next(option for option in sorted(options, key=len, reverse=True) if prompt.endswith(option))
    contexts = tuple(prompt.removesuffix(tail) + option for option in options)
    _, blank, rest = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no blank")
    return {"choices": options, "continuations": (rest.strip(),) * 2, "contexts": contexts, "correct": correct}


def _gsm8k(row: Row) -> dict[str, Any]:
    # Of five hashes the first four are the marker.
    _, *targets = row["answer"].split("####")
    if not targets or not targets[-1].strip():
        raise ValueError("the answer has nothing after ####")
    return {"target_answer": targets[-1].strip()}


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("tiny_mmlu", "mmlu", ("tinyBenchmarks/tinyMMLU", None, "test"), "acc", _mmlu,
             {"answer", "choices", "input_formatted", "question", "subject"}),
        Task("tiny_hellaswag", "hellaswag", ("tinyBenchmarks/tinyHellaswag", None, "validation"), "acc_norm",
             _hellaswag, {"activity_label", "ctx", "ctx_a", "ctx_b", "endings", "ind", "input_formatted", "label",
                          "source_id", "split", "split_type"}),
        Task("tiny_truthfulqa", "truthfulqa", ("tinyBenchmarks/tinyTruthfulQA", "multiple_choice", "validation"), "mc2",
             _truthfulqa, {"input_formatted", "mc1_targets", "mc2_targets", "question"}),
        Task("tiny_winogrande", "winogrande", ("tinyBenchmarks/tinyWinogrande", "winogrande_xl", "validation"), "acc",
             _winogrande, {"answer", "input_formatted", "option1", "option2", "sentence"}),
        Task("tiny_gsm8k", "gsm8k", ("tinyBenchmarks/tinyGSM8k", "main", "test"), "", _gsm8k,
             {"answer", "input_formatted", "question"}),
    )
}  # fmt: skip


def score_choices(example: Example, metric: str, log_probs: Sequence[float]) -> dict[str, Any]:
    """What the log-probabilities (natural) of the continuations say by a task's metric; ties go to the first choice.

    Returns:
      prediction and gold (letters) with their texts, example_score, is_correct (None for mc2), raw_accuracy,
      normalized, probabilities.
    """
    raw = np.asarray(log_probs, np.float64)
    lengths = np.array([max(len(choice), 1) for choice in example.choices])
    normalized = raw / lengths
    probabilities = np.exp(raw - raw.max())
    probabilities /= probabilities.sum()
    chosen = int(np.argmax(normalized if metric == "acc_norm" else raw))
    score = float(chosen == example.correct)
    if metric == "mc2":
        score = float(sum(p for p, target in zip(probabilities, example.target_scores, strict=True) if target))
    return {
        "prediction": string.ascii_uppercase[chosen],
        "prediction_text": example.choices[chosen],
        "gold": string.ascii_uppercase[example.correct],
        "gold_text": example.choices[example.correct],
        "example_score": score,
        "is_correct": None if metric == "mc2" else chosen == example.correct,
        "raw_accuracy": float(np.argmax(raw) == example.correct),
        "normalized": normalized.tolist(),
        "probabilities": probabilities.tolist(),
    }


def clean_response(text: str, *, thinks: bool) -> str:
    """A generated answer up to the first stop string; without reasoning blocks if the model writes them."""
    text = re.split("|".join(map(re.escape, STOP_STRINGS)), text, maxsplit=1)[0].strip()
    return strip_thinking(text).strip() if thinks else text


def normal_form(text: str) -> str | None:
    """A number in plain notation without commas and final zeros, at 28 significant digits; None if it is none."""
    try:
        value = decimal.Decimal(text.strip().replace(",", ""))
    except decimal.InvalidOperation:
        return None
    if not value.is_finite():
        return None
    value = value.normalize(decimal.Context(prec=28))
    return "0" if value == 0 else f"{value:f}"


def score_response(response: str, target_answer: str) -> dict[str, Any]:
    """The answers in a cleaned response, `strict` and `flexible`, each None where there is none, and their scores."""
    marked = _MARKED.search(response)
    numbers = _NUMBER.findall(marked[1]) if marked else []
    strict = normal_form(numbers[0]) if len(numbers) == 1 else None
    anywhere = _NUMBER.findall(response)
    flexible = normal_form(anywhere[-1]) if anywhere else None
    gold = normal_form(target_answer)
    return {
        "gold": gold,
        "strict": strict,
        "strict_correct": gold is not None and strict == gold,
        "flexible": flexible,
        "flexible_correct": gold is not None and flexible == gold,
    }


def choice_row(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A multiple-choice task's row from what `score_choices` gave."""
    row = _row(task.name, task.benchmark, [record["example_score"] for record in records])
    if not records:
        return row
    raw = float(np.mean([record["raw_accuracy"] for record in records]))
    further = {"acc_norm": {"raw_accuracy": raw}, "mc2": {"argmax_accuracy": raw}}.get(task.metric, {})
    return row | {"metric_name": task.metric} | further


def response_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """GSM8K's two rows from what `score_response` gave."""
    rows = []
    for name, kind in ((STRICT, "strict"), (FLEXIBLE, "flexible")):
        row = _row(name, "gsm8k", [float(record[f"{kind}_correct"]) for record in records])
        failed = [record[kind] is None for record in records]
        rows.append(row | {"extraction_failure_rate": float(np.mean(failed)) if failed else 0.0})
    return rows


def _row(name: str, benchmark: str, scores: Sequence[float]) -> dict[str, Any]:
    total = math.fsum(scores)
    return {
        "task_name": name,
        "benchmark_name": benchmark,
        "num_examples": len(scores),
        "score_sum": total,
        "num_correct": int(total) if {*scores} <= {0.0, 1.0} else None,
        "accuracy": total / len(scores) if scores else 0.0,
    }


def aggregate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics over all task rows; GSM8K counts twice in `mean_accuracy`, as in the paper's."""
    by_name = {row["task_name"]: row["accuracy"] for row in rows}
    estimates = [row["gpirt"] for row in rows if row.get("gpirt") is not None]
    choices = [row["accuracy"] for row in rows if row["benchmark_name"] != "gsm8k"]
    return {
        "num_tasks": len(rows),
        "mean_accuracy": float(np.mean([row["accuracy"] for row in rows])) if rows else 0.0,
        "mean_gpirt": float(np.mean(estimates)) if estimates else None,
        "mean_mc_accuracy": float(np.mean(choices)) if choices else 0.0,
        "gsm8k_strict_accuracy": by_name.get(STRICT),
        "gsm8k_flexible_accuracy": by_name.get(FLEXIBLE),
    }
