"""Metrics of sampled answers to one prompt of the structured suite, and what its exact ones share with them. Pure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cft_jax.distributions.parse import ParsedNumber, number_error, parse_number, parse_numbers, strip_thinking
from cft_jax.distributions.tasks import Task
from cft_jax.evaluate.metrics import exact, paper, sound
from cft_jax.evaluate.metrics.target import FamilyTarget, ListedTarget, Target

Metrics = dict[str, Any]


def target_of_task(task: Task, num_decimals: int) -> Target | None:
    """What a task's numbers are measured against; None where its values are no numbers."""
    if task.spec is not None:
        return FamilyTarget(task.spec.family_id, task.spec.parameters, num_decimals)
    assert task.space is not None
    numbers = exact.as_numbers(task.space.values)
    return None if numbers is None else ListedTarget.of(numbers, task.space.probabilities)


def scaled_distance(section: str, metrics: Mapping[str, float], target: Target | None) -> Metrics:
    """The section with a Wasserstein-1 distance in interquartile ranges of its target; empty where there is none."""
    if target is None or "wasserstein_1" not in metrics:
        return {}
    distance = sound.in_interquartile_ranges(metrics["wasserstein_1"], target)
    return {section: finite({"wasserstein_1_over_iqr": distance})}


@dataclass(frozen=True)
class Answers:
    """Completions read as answers.

    Attributes:
      num_answers: answers asked for.
      num_valid: of them, those that read as what was asked for.
      num_violations: valid numbers the distribution cannot give.
      numbers: the valid finite numbers, violations included (as in the paper).
      texts: the valid answers of tasks whose values are no numbers.
      lenient_parses: how many answers the paper's parser takes that a stricter one would not, by kind.
    """

    num_answers: int
    num_valid: int
    num_violations: int
    numbers: Float[np.ndarray, "N"]
    texts: tuple[str, ...]
    lenient_parses: Mapping[str, int]


def read_answers(completions: Sequence[str], task: Task, *, per_completion: int) -> Answers:
    """Reads completions by the paper's rules; one that is a listed value to the letter stays as it is.

    Args:
      completions: texts as sampled; thinking traces are removed first.
      task: tells what counts as valid: a number for the families and for listed numbers, else one of the values.
      per_completion: 1, or how many comma-separated numbers each completion should hold; further ones are ignored and
        missing ones count as invalid.
    """
    listed = frozenset(() if task.space is None else task.space.values)
    # Values may begin or end with spaces.
    stripped = [text if text in listed else strip_thinking(text) for text in completions]
    if task.space is not None and exact.as_numbers(task.space.values) is None:
        texts = tuple(text for text in stripped if text in listed)
        return Answers(len(stripped), len(texts), 0, np.zeros(0), texts, {})
    parsed = [number for text in stripped for number in _numbers(text, per_completion)]
    valid = [number for number in parsed if number.value is not None]
    values = np.array([number.value for number in valid], np.float64)
    lenient_parses = {
        "non_finite": sum(not math.isfinite(value) for value in values),
        "other_digits": sum(not number.raw.isascii() for number in valid),
        "joined_by_trace": sum(_joins(raw, text) for raw, text in zip(completions, stripped, strict=True)),
    }
    return Answers(
        num_answers=len(completions) * per_completion,
        num_valid=len(valid),
        num_violations=sum(_violates(number, task, listed) for number in valid),
        numbers=values[np.isfinite(values)],
        texts=(),
        lenient_parses={kind: count for kind, count in lenient_parses.items() if count},
    )


def sampled_section(answers: Answers, task: Task, target: Target | None, rng: np.random.Generator) -> Metrics:
    """Metrics of one set of answers: sections of the prompt's record.

    Returns:
      `sampled` under the paper's names; `sampled_scaled` (Wasserstein-1 in interquartile ranges); `intervals`, [low,
      high, standard error] by metric; `ideal`, what a perfect sampler gets with as many answers; `paper_gof`, the
      paper's test; `tests`, sound ones; `lenient_parses`. Metrics that do not exist are absent.
    """
    count = answers.num_answers
    rates = {"valid_rate": answers.num_valid, "support_violation_rate": answers.num_violations}
    intervals = {name: sound.rate_interval(hits, count) for name, hits in rates.items()}
    sections: Metrics = {"sampled": {name: hits / count for name, hits in rates.items()}}
    if target is None:
        space = task.space
        assert space is not None
        observed = Counter(answers.texts)
        cells = np.array([observed[value] for value in space.values], np.float64)
        sections["tests"] = finite(sound.chi_square_metrics(cells, space.probabilities)) if cells.any() else {}
    else:
        metrics = finite(paper.moment_metrics(answers.numbers, target))
        errors = {name: metrics[name] for name in sound.ERROR_METRICS if name in metrics}
        sections["sampled"] |= errors
        intervals |= sound.bootstrap_intervals(answers.numbers, target, rng)
        sections["ideal"] = sound.ideal_metrics(target, count, rng)
        sections["tests"] = finite(sound.tests_of_target(answers.numbers, target, rng))
        sections |= scaled_distance("sampled_scaled", errors, target)
    if task.spec is not None:
        sections["paper_gof"] = finite(paper.goodness_of_fit(answers.numbers, task.spec))
    sections["intervals"] = {name: [i.low, i.high, i.standard_error] for name, i in intervals.items()}
    sections["lenient_parses"] = dict(answers.lenient_parses)
    return sections


def mean_sections(sections: Sequence[Metrics]) -> Metrics:
    """The sections of several sets of answers as one: means of metrics, sums of lenient parses, the first set's tests.

    A metric that some sets lack is left out. Standard errors of means shrink with the number of sets.
    """
    if len(sections) == 1:
        return sections[0]
    merged: Metrics = {}
    for name, first in sections[0].items():
        parts = [section[name] for section in sections if name in section]
        common = [key for key in first if all(key in part for part in parts)]
        if name == "lenient_parses":
            merged[name] = dict(sum(map(Counter, parts), Counter()))
        elif name in ("tests", "paper_gof"):
            merged[name] = first
        elif name == "intervals":
            merged[name] = {key: _mean_interval([part[key] for part in parts]) for key in common}
        else:
            merged[name] = {key: math.fsum(part[key] for part in parts) / len(parts) for key in common}
    return merged


def finite(metrics: Mapping[str, Any]) -> Metrics:
    """Without metrics that do not exist: None, NaN and infinities."""
    return {
        name: value
        for name, value in metrics.items()
        if value is not None and (not isinstance(value, float) or math.isfinite(value))
    }


def _numbers(text: str, per_completion: int) -> list[ParsedNumber]:
    return [parse_number(text)] if per_completion == 1 else parse_numbers(text)[:per_completion]


def _violates(number: ParsedNumber, task: Task, listed: frozenset[str]) -> bool:
    assert number.value is not None
    if task.spec is not None:
        return number_error(number.value, task.spec) is not None
    return listed.isdisjoint((number.raw, number.raw.strip()))


def _joins(raw: str, stripped: str) -> bool:
    """Whether a thinking trace was cut out of the middle of a number."""
    before = raw.lower().partition("<think>")[0].strip()
    after = raw.lower().rpartition("</think>")[2].strip()
    return bool(before and after and before != raw.lower().strip() and parse_number(stripped).valid)


def _mean_interval(intervals: Sequence[Sequence[float]]) -> list[float]:
    """The interval around the mean of independent metrics: half-widths and errors add in quadrature."""
    centre = [(low + high) / 2 for low, high, _ in intervals]
    half = math.sqrt(math.fsum(((high - low) / 2) ** 2 for low, high, _ in intervals)) / len(intervals)
    middle = math.fsum(centre) / len(centre)
    error = math.sqrt(math.fsum(e**2 for _, _, e in intervals)) / len(intervals)
    return [max(middle - half, 0.0), middle + half, error]
