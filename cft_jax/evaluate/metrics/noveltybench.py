"""Metrics of NoveltyBench (arXiv 2504.05228): classes of equivalent answers, and the utility of a list of answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REWARD_THRESHOLDS = (-7.71875, -6.28125, -6.0, -5.71875, -5.5, -5.0, -4.375, -3.4375, -2.046875)
"""Raw rewards of Skywork-Reward-Gemma-2-27B-v0.2 above which an answer is worth one point more, from 1 to 10."""

MAX_SHORT_WORDS = 5
"""Answers up to this many words are compared by their words, longer ones by the classifier."""

PairScorer = Callable[[str, Sequence[str]], Sequence[float]]
"""Scores an answer against several others: one probability of equivalence each."""


def reward_score(raw: float) -> int:
    """Points from 1 to 10 for a raw reward; a value equal to a threshold gets the lower score, NaN gets 1."""
    return 1 + sum(threshold < raw for threshold in REWARD_THRESHOLDS)


def short_answers_equal(a: str, b: str) -> bool | None:
    """Whether two short answers are the same by their words; None where one is too long to tell.

    The paper's rule: twice the number of *distinct* shared words is at least the longer one's number of words, so that
    an answer with repeated words ("ha ha ha") can differ from itself.
    """
    words_a, words_b = a.lower().split(), b.lower().split()
    longest = max(len(words_a), len(words_b))
    return None if longest > MAX_SHORT_WORDS else 2 * len(set(words_a) & set(words_b)) >= longest


@dataclass(frozen=True)
class Partition:
    """Classes of equivalent answers, numbered in the order of their first answers, and what the scorer was asked."""

    classes: tuple[int, ...]
    num_classifier_pairs: int
    num_classifier_calls: int


def partition_answers(answers: Sequence[str], scorer: PairScorer, *, threshold: float) -> Partition:
    """Greedy classes of a prompt's answers: each that has none opens one and takes in the later ones equivalent to it.

    Long answers are equivalent when their score exceeds `threshold`; `scorer` is asked once per opener that has such
    candidates, with all of them.
    """
    classes = [-1] * len(answers)
    num_classes = num_pairs = num_calls = 0
    for opener, answer in enumerate(answers):
        if classes[opener] >= 0:
            continue
        later = [j for j in range(opener + 1, len(answers)) if classes[j] < 0]
        equal = {j: short_answers_equal(answer, answers[j]) for j in later}
        undecided = [j for j in later if equal[j] is None]
        if undecided:
            scores = scorer(answer, [answers[j] for j in undecided])
            equal.update((j, score > threshold) for j, score in zip(undecided, scores, strict=True))
            num_pairs += len(undecided)
            num_calls += 1
        for j in (opener, *(j for j in later if equal[j])):
            classes[j] = num_classes
        num_classes += 1
    return Partition(tuple(classes), num_pairs, num_calls)


@dataclass(frozen=True)
class ListScore:
    """Points of every answer (0 for a repeat), of every class, and the discounted mean over the list."""

    generation_scores: tuple[int, ...]
    partition_scores: tuple[int, ...]
    utility: float


def score_list(classes: Sequence[int], raw_rewards: Sequence[float], *, patience: float) -> ListScore:
    """Utility of a list of answers to a reader who goes on to the next one with probability `patience`.

    Utility is sum_i patience^i s_i / sum_i patience^i, where s_i are the points of answer i, 0 if it repeats an
    earlier class; 0 for an empty list.

    Raises:
      ValueError: class numbers do not appear in increasing order without gaps.
    """
    seen = 0
    scores = []
    for number, raw in zip(classes, raw_rewards, strict=True):
        if number > seen:
            raise ValueError(f"class numbers {list(classes)} must appear in increasing order without gaps")
        scores.append(reward_score(raw) if number == seen else 0)
        seen = max(seen, number + 1)
    weights = [patience**i for i in range(len(scores))]
    total = math.fsum(weight * score for weight, score in zip(weights, scores, strict=True))
    utility = total / math.fsum(weights) if scores else 0.0
    return ListScore(tuple(scores), tuple(score for score in scores if score), utility)


def noveltybench_summary(lists: Sequence[ListScore]) -> dict[str, float | int]:
    """Means over prompts of the number of classes and of the utility, 0 without prompts, as in the paper."""
    count = len(lists)
    return {
        "num_prompts": count,
        "mean_distinct": math.fsum(len(scores.partition_scores) for scores in lists) / max(count, 1),
        "mean_utility": math.fsum(scores.utility for scores in lists) / max(count, 1),
    }
