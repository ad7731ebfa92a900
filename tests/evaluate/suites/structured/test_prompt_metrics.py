"""Completions read as answers: what is valid, what violates the support, and the parser's oddities."""

import numpy as np
import pytest

from cft_jax.distributions import OutputSpace, PromptSpec, Task, task_from_spec
from cft_jax.evaluate.suites.structured.prompt_metrics import read_answers

BINOMIAL = task_from_spec(PromptSpec("train", "binomial", "b", {"n": 5.0, "p": 0.5}, "prompt"))


def test_numbers_of_a_family():
    texts = ["3", " 4.0 ", "9", "2.5", "three", "", "<think>hm</think>1", "1e999", "nan"]
    answers = read_answers(texts, BINOMIAL, per_completion=1)
    assert (answers.num_answers, answers.num_valid) == (9, 6)
    # 9 is above the support, 2.5 no integer, 1e999 not finite; the first two still count in the paper's metrics.
    assert answers.num_violations == 3
    assert answers.numbers.tolist() == [3, 4, 9, 2.5, 1]
    assert answers.lenient_parses == {"non_finite": 1}


def test_oddities_of_the_parser():
    texts = ["1<think>x</think>2", "<think>x</think>3", "٣", "4</think>"]
    answers = read_answers(texts, BINOMIAL, per_completion=1)
    assert answers.lenient_parses == {"joined_by_trace": 1, "other_digits": 1}
    assert answers.numbers.tolist() == [12, 3, 3]


def test_several_numbers_per_completion():
    answers = read_answers(["1, 2,3", "4", "1,2,3,4,5"], BINOMIAL, per_completion=3)
    # Missing numbers are invalid, those beyond the third are ignored.
    assert (answers.num_answers, answers.num_valid) == (9, 7)
    assert answers.numbers.tolist() == [1, 2, 3, 4, 1, 2, 3]


@pytest.mark.parametrize(("text", "valid"), [("red", True), (" red ", True), ("blue ", True), ("blue", False)])
def test_listed_texts(text, valid):
    space = OutputSpace(("red", "blue "), np.array([0.5, 0.5]))
    task = Task("train", "custom", "c", ({"role": "user", "content": "q"},), space=space)
    assert read_answers([text], task, per_completion=1).num_valid == int(valid)


@pytest.mark.parametrize(("text", "violates"), [("7", False), (" 7 ", False), (" 8", False), ("8", True), ("9 ", True)])
def test_listed_numbers_count_to_the_letter(text, violates):
    space = OutputSpace(("7", " 8"), np.array([0.5, 0.5]))
    task = Task("train", "custom", "c", ({"role": "user", "content": "q"},), space=space)
    answers = read_answers([text], task, per_completion=1)
    assert (answers.num_valid, answers.num_violations) == (1, int(violates))
