"""The suite of questions: its metrics by a scripted model, and that it tells the two halves apart."""

import json
import math

import pytest

from cft_jax.common.errors import UserError
from cft_jax.config import Config, changed, validate
from cft_jax.config.suites import QUESTION_GROUPS, QuestionsConfig, SuiteConfig
from cft_jax.distributions.questions import questions
from cft_jax.evaluate.suites import questions as suite
from cft_jax.evaluate.suites.questions import KEPT, OTHERS, TEXTS
from cft_jax.generate import Likelihood
from cft_jax.text.scratch import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for question in questions() for text in (question.prompt, question.answer)])


class Forgetful:
    """Knows the kept half for sure, and of the other half the capitals alone, each token with probability 1/2."""

    fingerprint, max_length = "forgetful", None

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def log_likelihoods(self, requests):
        self.calls += 1
        found = []
        for prompt, answer in requests:
            text = self.tokenizer.decode(prompt, skip_special_tokens=True)
            assert answer[-1] == self.tokenizer.eos_token_id
            (question,) = [question for question in questions() if question.prompt == text]
            assert self.tokenizer.decode(answer[:-1]) == question.answer
            knows = question.kept or question.topic == "capitals"
            found.append(Likelihood(0.0 if question.kept else len(answer) * math.log(0.5), knows))
        return found

    def unasked(self, *_, **__):
        raise AssertionError("the suite asks for nothing else")

    sample = score = next_token_log_probs = token_log_probs = unasked


def test_the_fewest_that_can_be_asked_are_of_every_topic_and_half(run_suite, tokenizer, tmp_path):
    assert len({(question.topic, question.kept) for question in questions()}) == QUESTION_GROUPS
    few = SuiteConfig(questions=QuestionsConfig(num_questions=QUESTION_GROUPS))
    summary = run_suite(suite.run, Forgetful(tokenizer), tokenizer, tmp_path, suite=few)
    assert all(half["num_questions"] == 1 for halves in summary["topics"].values() for half in halves.values())
    with pytest.raises(UserError, match="num_questions=13 must be 0 for all, or at least 14"):
        validate(changed(Config(), {"suite": {"questions": {"num_questions": QUESTION_GROUPS - 1}}}))


def test_both_halves_by_topic(run_suite, tokenizer, tmp_path):
    model = Forgetful(tokenizer)
    summary = run_suite(suite.run, model, tokenizer, tmp_path)
    kept, others = summary["halves"][KEPT], summary["halves"][OTHERS]
    assert kept["accuracy"] == kept["probability"] == 1 and kept["nats_per_token"] == 0
    short = [question for question in questions() if not question.kept and question.topic != TEXTS]
    assert others["num_questions"] == len(short)
    assert others["accuracy"] == sum(question.topic == "capitals" for question in short) / len(short)
    assert others["nats_per_token"] == pytest.approx(math.log(2))
    assert summary["topics"]["capitals"][OTHERS]["accuracy"] == 1 and summary["topics"][TEXTS][OTHERS]["accuracy"] == 0
    assert json.loads((tmp_path / "summary.json").read_text())["halves"] == summary["halves"]
    calls = model.calls
    assert run_suite(suite.run, model, tokenizer, tmp_path) == summary and model.calls == calls
