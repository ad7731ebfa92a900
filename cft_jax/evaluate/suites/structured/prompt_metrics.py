"""All metrics of one prompt of the structured suite, from the model's probabilities and from its samples. Pure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cft_jax.distributions.families import find_family
from cft_jax.distributions.output_space import OutputSpace
from cft_jax.distributions.parse import ParsedNumber, number_error, parse_number, parse_numbers, strip_thinking
from cft_jax.distributions.tasks import Task
from cft_jax.evaluate.metrics import exact, paper, paths, sound
from cft_jax.evaluate.metrics.target import FamilyTarget, ListedTarget, Target
from cft_jax.generate import TrieScore
from cft_jax.text.trie import Trie

Metrics = dict[str, Any]


def exact_section(space: OutputSpace, scores: TrieScore, target: Target | None) -> Metrics:
    """Metrics of the model's whole distribution over a listed space: sections of the prompt's record.

    Args:
      space: the strings and the target.
      scores: the model's, for the whole trie of the same strings.
      target: scale of the values; None for strings that are no numbers.

    Returns:
      `exact` (see `exact_figures`), `exact_scaled` (Wasserstein-1 in interquartile ranges), `calibration` (the model's
      mass in bins of equal target mass), and `other_stops`, the mass that ends a value by another stop token.
    """
    log_probs = scores.string_log_probs
    metrics = exact.exact_figures(space.probabilities, log_probs, space.values)
    sections: Metrics = {"exact": finite(metrics)}
    if target is not None and "wasserstein_1" in metrics:
        scaled = sound.in_interquartile_ranges(metrics["wasserstein_1"], target)
        sections["exact_scaled"] = finite({"wasserstein_1_over_iqr": scaled})
    _, model = exact.calibration_bins(space.probabilities, log_probs, exact.as_numbers(space.values))
    sections["calibration"] = rounded(model)
    sections["other_stops"] = {"mass": float(np.exp(scores.other_stop_log_probs).sum())}
    return sections


def distribution_section(task: Task, space: OutputSpace, scores: TrieScore) -> Metrics:
    """What plots of one prompt need: its name, the values, the target and the model's probabilities, to 6 digits."""
    model = np.exp(scores.string_log_probs)
    if task.spec is not None:
        kind = find_family(task.spec.family_id).kind
    else:
        kind = "text" if exact.as_numbers(space.values) is None else "discrete"
    values = {"values": list(space.values), "target": rounded(space.probabilities), "model": rounded(model)}
    return named(task) | {"kind": kind} | values


def named(task: Task) -> Metrics:
    """A prompt's name for plots: `title` and `parameters`."""
    if task.spec is None:
        return {"title": task.messages[-1]["content"], "parameters": {}}
    title = find_family(task.spec.family_id).display_name
    return {"title": title, "parameters": dict(task.spec.parameters)}


def path_draws(space: OutputSpace, count: int, rng: np.random.Generator) -> Int[np.ndarray, "S"]:
    """Indices of `count` strings drawn from the target."""
    return rng.choice(space.probabilities.size, size=count, p=space.probabilities)


def mean_path_kl(trie: Trie, scores: TrieScore, strings: Int[np.ndarray, "S"], epsilon: float) -> float:
    """The paper's path KL: mean over drawn strings of the mean over their steps, in nats."""
    steps = paths.step_kl(trie, scores.child_log_probs, epsilon)
    return float(np.mean(paths.path_kl(trie, steps)[strings]))


def expected_path_kl(space: OutputSpace, trie: Trie, scores: TrieScore, epsilon: float) -> float:
    """The expectation of the path KL over strings drawn from the target: the number `mean_path_kl` estimates."""
    steps = paths.step_kl(trie, scores.child_log_probs, epsilon)
    drawn = space.probabilities > 0
    return float(space.probabilities[drawn] @ paths.path_kl(trie, steps)[drawn])


def target_of_task(task: Task, num_decimals: int) -> Target | None:
    """What a task's numbers are measured against; None where its values are no numbers."""
    if task.spec is not None:
        return FamilyTarget(task.spec.family_id, task.spec.parameters, num_decimals)
    assert task.space is not None
    numbers = exact.as_numbers(task.space.values)
    return None if numbers is None else ListedTarget.of(numbers, task.space.probabilities)


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
    errors = [_number_error(number, task, listed) for number in valid]
    values = np.array([number.value for number in valid], np.float64)
    lenient_parses = {
        "non_finite": sum(not math.isfinite(value) for value in values),
        "other_digits": sum(not number.raw.isascii() for number in valid),
        "joined_by_trace": sum(_joins(raw, text) for raw, text in zip(completions, stripped, strict=True)),
    }
    return Answers(
        num_answers=len(completions) * per_completion,
        num_valid=len(valid),
        num_violations=sum(error is not None for error in errors),
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
        if "wasserstein_1" in errors:
            scaled = sound.in_interquartile_ranges(errors["wasserstein_1"], target)
            sections["sampled_scaled"] = finite({"wasserstein_1_over_iqr": scaled})
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
    for name in sections[0]:
        parts = [section[name] for section in sections if name in section]
        if name == "lenient_parses":
            merged[name] = dict(sum((Counter(part) for part in parts), Counter()))
        elif name in ("tests", "paper_gof"):
            merged[name] = sections[0][name]
        elif name == "intervals":
            merged[name] = {key: _mean_interval([p[key] for p in parts]) for key in _common(parts)}
        else:
            merged[name] = {key: math.fsum(p[key] for p in parts) / len(parts) for key in _common(parts)}
    return merged


def finite(metrics: Mapping[str, Any]) -> Metrics:
    """Without metrics that do not exist: None, NaN and infinities."""
    return {
        name: value
        for name, value in metrics.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def rounded(values: Float[np.ndarray, "N"]) -> list[float]:
    """Six significant digits, enough for a plot and a quarter of the bytes."""
    return [float(f"{value:.6g}") for value in values]


def _numbers(text: str, per_completion: int) -> list[ParsedNumber]:
    return [parse_number(text)] if per_completion == 1 else parse_numbers(text)[:per_completion]


def _number_error(number: ParsedNumber, task: Task, listed: frozenset[str]) -> str | None:
    assert number.value is not None
    if task.spec is not None:
        return number_error(number.value, task.spec)
    return None if number.raw in listed or number.raw.strip() in listed else "not_listed"


def _joins(raw: str, stripped: str) -> bool:
    """Whether a thinking trace was cut out of the middle of a number."""
    before = raw.lower().partition("<think>")[0].strip()
    after = raw.lower().rpartition("</think>")[2].strip()
    return bool(before and after and before != raw.lower().strip() and parse_number(stripped).valid)


def _common(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in parts[0] if all(key in part for part in parts)]


def _mean_interval(intervals: Sequence[Sequence[float]]) -> list[float]:
    """The interval around the mean of independent metrics: half-widths and errors add in quadrature."""
    centre = [(low + high) / 2 for low, high, _ in intervals]
    half = math.sqrt(math.fsum(((high - low) / 2) ** 2 for low, high, _ in intervals)) / len(intervals)
    middle = math.fsum(centre) / len(centre)
    error = math.sqrt(math.fsum(e**2 for _, _, e in intervals)) / len(intervals)
    return [max(middle - half, 0.0), middle + half, error]
