"""The user's own prompts and distributions, from a JSONL file."""

import difflib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import find_family
from cft_jax.distributions.output_space import OutputSpace
from cft_jax.distributions.splits import SPLITS, TRAIN, PromptSpec, distribution_id
from cft_jax.distributions.tasks import Task

_QUESTIONS = ("prompt", "messages")
_ANSWERS = ("values", "distribution", "counts", "samples")
_KEYS = (*_QUESTIONS, *_ANSWERS, "probabilities", "split", "weight")
_PROBLEMS_SHOWN = 10
_Row = Mapping[str, Any]


def read_tasks(path: str | Path) -> list[Task]:
    """Reads tasks from a file with one JSON object per line, UTF-8.

    Each row asks by one of
      "prompt": the text of one user message;
      "messages": a list of {"role", "content"}: an optional system message, then user and assistant in turn, the user
        last;
    and says by one of these what the answers should follow:
      "values" with "probabilities": any different strings and their probabilities, which must sum to 1 within 1e-6 and
        are then divided by their sum;
      "counts": an object value → whole number, such as the answers of a survey;
      "samples": a list of observed values, whose relative frequencies are taken;
      "distribution": {"family": a name in `FAMILIES`, "parameters": {name: number}}, discretised like the families'
        own prompts.
    Optional are "split" (`train`, the default, `test_unseen_params` or `test_ood_family`) and "weight" (positive,
    default 1).

    Values are taken exactly as written: spaces, line breaks and any script count, and one may begin another. An integer
    stands for its decimal string; other numbers must be quoted, because 0.5, 0.50 and 5e-1 are different answers.
    A task's group, the unit of equal weight, is the family of its distribution, else "custom".

    Raises:
      UserError: the file cannot be read or is empty, or rows are wrong: one message with every bad line's number
        (the first ten with their reasons). No row is skipped.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read data.custom={str(path)!r}: {error.strerror}") from error
    # Not splitlines(): it would also break lines at separators that JSON strings may hold.
    lines = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise UserError(f"data.custom={str(path)!r} is empty; give it one JSON object per line")
    tasks, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            tasks.append(task_of_row(_parse(line), number))
        except UserError as error:
            problems.append((number, error))
    if problems:
        shown = " | ".join(f"line {number}: {problem}" for number, problem in problems[:_PROBLEMS_SHOWN])
        rest = ", ".join(str(number) for number, _ in problems[_PROBLEMS_SHOWN:])
        more = f" | and lines {rest}" if rest else ""
        raise UserError(f"{len(problems)} of {len(lines)} lines of data.custom={str(path)!r} are wrong: {shown}{more}")
    return tasks


def _parse(line: bytes) -> _Row:
    if not line.strip():
        raise UserError("is empty; delete it")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested lists
        raise UserError(f"is not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"must be a JSON object, not {reprlib.repr(row)}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ; Python's own reader keeps the last of equal keys in silence."""
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise UserError(f"{repeated[0]!r} occurs more than once in one object")
    return dict(pairs)


def task_of_row(row: Mapping[str, Any], number: int) -> Task:
    """The task of one row, see `read_tasks`; its number names it.

    Raises:
      UserError: with every problem of the row.
    """
    found: list[str] = []
    _collect(found, _check_keys, row)
    messages = _collect(found, _messages, row) or ()
    split = _collect(found, _split, row) or TRAIN
    weight = _collect(found, _weight, row) or 1.0
    spec = _collect(found, _spec, row, split, messages) if "distribution" in row else None
    space = None if "distribution" in row else _collect(found, _space, row)
    if found:
        raise UserError("; ".join(found))
    group = spec.family_id if spec else "custom"
    return Task(split, group, f"custom_{number}", messages, spec, space, weight)


def _collect(found: list[str], read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` returns, or None with its problem added to those found."""
    try:
        return read(*arguments)
    except UserError as error:
        found.append(str(error))
        return None


def _check_keys(row: _Row) -> None:
    for name in row:
        if name not in _KEYS:
            near = difflib.get_close_matches(name, _KEYS, n=1)
            raise UserError(f"unknown key {name!r}; " + (f"did you mean {near[0]!r}?" if near else _one_of(_KEYS)))
    for alternatives in (_QUESTIONS, _ANSWERS):
        given = [name for name in alternatives if name in row]
        if len(given) != 1:
            raise UserError(f"needs exactly {_one_of(alternatives)}, not {' and '.join(given) or 'none'}")
    if ("values" in row) != ("probabilities" in row):
        raise UserError("values and probabilities come together")


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}"


def _messages(row: _Row) -> tuple[Mapping[str, str], ...]:
    if "prompt" in row:
        return ({"role": "user", "content": _text(row["prompt"], "prompt")},)
    if "messages" not in row:
        return ()
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of objects with role and content")
    read = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UserError(f"messages[{index}] must be an object with exactly role and content")
        read.append({"role": message["role"], "content": _text(message["content"], f"messages[{index}].content")})
    turns = [message["role"] for message in read]
    turns = turns[1:] if turns[0] == "system" else turns
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise UserError("messages must be an optional system message, then user and assistant in turn, the user last")
    return tuple(read)


def _split(row: _Row) -> str:
    split = row.get("split", TRAIN)
    if split not in SPLITS:
        raise UserError(f"split={reprlib.repr(split)} must be {_one_of(SPLITS)}")
    return split


def _weight(row: _Row) -> float:
    weight = _number(row.get("weight", 1.0), "weight")
    if weight <= 0:
        raise UserError(f"weight={weight} must be greater than 0")
    return weight


def _spec(row: _Row, split: str, messages: Sequence[Mapping[str, str]]) -> PromptSpec:
    named = row["distribution"]
    if not isinstance(named, dict) or set(named) != {"family", "parameters"}:
        raise UserError('distribution must be an object {"family": a name, "parameters": {name: number}} and no more')
    if not isinstance(named["family"], str) or not isinstance(named["parameters"], dict):
        raise UserError("distribution must have a name as family and an object as parameters")
    family = find_family(named["family"])
    family.validate(named["parameters"])
    parameters = {name: float(named["parameters"][name]) for name in family.parameter_names}
    prompt = messages[-1]["content"] if messages else ""
    return PromptSpec(split, family.family_id, distribution_id(family, parameters), parameters, prompt)


def _space(row: _Row) -> OutputSpace | None:
    if "values" in row and "probabilities" in row:
        probabilities = _list(row["probabilities"], "probabilities")
        numbers = [_number(value, f"probabilities[{index}]") for index, value in enumerate(probabilities)]
        return OutputSpace(_values(row["values"], "values"), np.array(numbers, dtype=np.float64))
    if "counts" not in row and "samples" not in row:
        return None
    counts = row["counts"] if "counts" in row else Counter(_values(row["samples"], "samples"))
    if not isinstance(counts, dict):
        raise UserError("counts must be an object of values and whole numbers")
    values = tuple(_value(value, "counts") for value in counts)
    for value, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f"count {count!r} of {value!r} must be a whole number of at least 0")
    total = sum(counts.values())
    if total == 0:
        raise UserError("nothing was counted; at least one value must have occurred")
    return OutputSpace(values, np.array([count / total for count in counts.values()]))


def _list(items: Any, name: str) -> list[Any]:
    if not isinstance(items, list):
        raise UserError(f"{name} must be a list")
    return items


def _values(items: Any, name: str) -> tuple[str, ...]:
    return tuple(_value(item, f"{name}[{index}]") for index, item in enumerate(_list(items, name)))


def _value(value: Any, name: str) -> str:
    if isinstance(value, float):
        raise UserError(f"{name}={reprlib.repr(value)} must be quoted, because its written form is the answer")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{name}={reprlib.repr(value)} must be a text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half of a character (a lone surrogate), which has no UTF-8 form") from error
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}={reprlib.repr(value)} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{name}={number} must be a finite number")
    return number
