"""The user's own prompts and distributions, from a JSONL file."""

import difflib
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
from cft_jax.distributions.rows import Row, one_of, prompt_messages, read_rows, text_of
from cft_jax.distributions.splits import SPLITS, TRAIN, PromptSpec, distribution_id
from cft_jax.distributions.tasks import Task

_QUESTIONS = ("prompt", "messages")
_ANSWERS = ("values", "distribution", "counts", "samples")
_KEYS = (*_QUESTIONS, *_ANSWERS, "probabilities", "split", "weight")


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
    return read_rows(path, "data.custom", task_of_row)


def task_of_row(row: Row, number: int) -> Task:
    """The task of one row, see `read_tasks`; its number names it.

    Raises:
      UserError: with every problem of the row.
    """
    found: list[str] = []
    _collect(found, _check_keys, row)
    messages = (_collect(found, prompt_messages, row) or ()) if {"prompt", "messages"} & row.keys() else ()
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


def _check_keys(row: Row) -> None:
    for name in row:
        if name not in _KEYS:
            near = difflib.get_close_matches(name, _KEYS, n=1)
            raise UserError(f"unknown key {name!r}; " + (f"did you mean {near[0]!r}?" if near else one_of(_KEYS)))
    for alternatives in (_QUESTIONS, _ANSWERS):
        given = [name for name in alternatives if name in row]
        if len(given) != 1:
            raise UserError(f"needs exactly {one_of(alternatives)}, not {' and '.join(given) or 'none'}")
    if ("values" in row) != ("probabilities" in row):
        raise UserError("values and probabilities come together")


def _split(row: Row) -> str:
    split = row.get("split", TRAIN)
    if split not in SPLITS:
        raise UserError(f"split={reprlib.repr(split)} must be {one_of(SPLITS)}")
    return split


def _weight(row: Row) -> float:
    weight = _number(row.get("weight", 1.0), "weight")
    if weight <= 0:
        raise UserError(f"weight={weight} must be greater than 0")
    return weight


def _spec(row: Row, split: str, messages: Sequence[Mapping[str, str]]) -> PromptSpec:
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


def _space(row: Row) -> OutputSpace | None:
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
    return text_of(value, name)


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
