"""Metrics of the multiple-choice suite: where the declared answers fall among the four positions."""

import math
from collections.abc import Mapping, Sequence

from scipy import stats

from cft_jax.evaluate.parsing import ANSWER_LABELS, Mcq


def mcq_summary(records: Sequence[Mcq]) -> dict[str, float | int]:
    """The paper's metrics of a set of questions, one per generation.

    Counts and frequencies of the answers are over parseable records, the other rates over all. The chi-square test is
    against equal counts, with 3 degrees of freedom; `tv_distance_from_uniform` is half the sum of |frequency - 1/4|.

    Returns:
      The paper's fields. What nothing parseable could tell is absent: frequencies, the test and the distances when no
      record is parseable (the paper writes 0, which reads as perfectly uniform), rates when there is no record.
    """
    answers = [record.correct_answer for record in records if record.is_parseable]
    counts = {label: answers.count(label) for label in ANSWER_LABELS}
    num_valid = sum(record.has_valid_correct_answer for record in records)
    summary: dict[str, float | int] = {
        "num_samples": len(records),
        "num_parseable": len(answers),
        "num_valid_correct_answer": num_valid,
        **{f"count_{label.lower()}": counts[label] for label in ANSWER_LABELS},
    }
    if records:
        summary["parse_rate"] = len(answers) / len(records)
        summary["valid_correct_answer_rate"] = num_valid / len(records)
        summary["unique_options_rate"] = sum(record.unique_options for record in records) / len(records)
    if answers:
        summary.update(_distances_from_uniform(counts, len(answers)))
    return summary


def _distances_from_uniform(counts: Mapping[str, int], total: int) -> dict[str, float]:
    frequencies = {label: count / total for label, count in counts.items()}
    expected = total / len(counts)
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    deviations = [abs(frequency - 1.0 / len(counts)) for frequency in frequencies.values()]
    return {
        **{f"freq_{label.lower()}": frequency for label, frequency in frequencies.items()},
        "chi_square_statistic": statistic,
        "chi_square_pvalue": float(stats.chi2.sf(statistic, len(counts) - 1)),
        "tv_distance_from_uniform": 0.5 * math.fsum(deviations),
        "max_abs_deviation_from_uniform": max(deviations),
    }


def answer_frequencies(summary: Mapping[str, float | int]) -> list[dict[str, float | int | str]]:
    """The rows of the answer table of `mcq_summary`; `frequency` is absent when nothing was parseable."""
    rows: list[dict[str, float | int | str]] = []
    for label in ANSWER_LABELS:
        rows.append({"answer_label": label, "count": summary[f"count_{label.lower()}"]})
        if f"freq_{label.lower()}" in summary:
            rows[-1]["frequency"] = summary[f"freq_{label.lower()}"]
    return rows
