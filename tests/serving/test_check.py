"""A server of a trained model over HTTP: honest it passes, and each mistake is caught and named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cft_jax.checkpoints import from_pretrained
from cft_jax.generate import Sampler
from cft_jax.jobs.check import compare
from cft_jax.serving import advice
from cft_jax.serving.client import Endpoint
from cft_jax.serving.prompts import SYSTEM
from cft_jax.serving.verdict import as_likely
from cft_jax.text import ChatOptions, encode_chats

pytestmark = [pytest.mark.usefixtures("program_cache"), pytest.mark.slow]
# Answers to each prompt, and where text alone must show a small mistake.
NUM, MORE = 100, 400


@pytest.fixture
def check(serve, reference):
    """Compares a server that behaves so with the reference."""

    def run(behaviour, num=NUM, **options):
        server = Endpoint(serve(behaviour), "tiny", key="", timeout=600, parallel=2, fields={})
        return compare(reference, server, num=num, **options)

    return run


@pytest.mark.parametrize("completions", [False, True])
def test_an_honest_server_passes(check, behave, trained, tokenizer, completions):
    result = check(behave(sampler=Sampler(trained, tokenizer)), completions=completions)
    verdict = result.verdict
    assert verdict.calibrated and not result.causes
    assert verdict.frequencies.p_value > 1e-3 and abs(verdict.temperature.value - 1) < 4 * verdict.temperature.error
    # The server's numbers are ours.
    assert abs(verdict.kl) < 1e-4
    assert result.draws.num.tolist() == [NUM] * len(result.replies)


def test_an_honest_server_passes_twenty_times_of_twenty(check, behave, trained, tokenizer):
    behaviour = behave(sampler=Sampler(trained, tokenizer), can=("n",))
    assert all(check(behaviour).verdict.calibrated for _ in range(20))


def test_what_a_server_cannot_do_is_done_without(check, behave):
    behaviour = behave(can=())
    result = check(behaviour)
    assert result.verdict.calibrated and np.isnan(result.verdict.kl)
    assert all("n" not in asked and "logprobs" not in asked for asked in behaviour.requests[-5:])
    assert result.draws.num.tolist() == [NUM] * len(result.replies)


def tempered(temperature):
    return lambda log_probs: log_probs / temperature


def top_k(k):
    return lambda log_probs: np.where(log_probs >= np.sort(log_probs)[-k], log_probs, -np.inf)


def top_p(p):
    def cut(log_probs):
        order = np.argsort(-log_probs)
        masses = np.exp(log_probs[order])
        kept = order[np.cumsum(masses) - masses < p]
        return np.where(np.isin(np.arange(log_probs.size), kept), log_probs, -np.inf)

    return cut


def min_p(p):
    return lambda log_probs: np.where(log_probs >= log_probs.max() + np.log(p), log_probs, -np.inf)


CUTS = {
    "temperature": (tempered(0.6), ("temperature",)),
    "top-k": (top_k(3), ("top-k",)),
    "top-p": (top_p(0.8), ("top-p",)),
    "greedy": (top_k(1), ("top-k",)),
}


@pytest.mark.parametrize("name", CUTS)
def test_sampling_that_is_left_on(check, behave, name):
    cut, kinds = CUTS[name]
    # With log-probabilities, which are as a rule those before the cut, and without.
    result = check(behave(cut=cut, can=("n", "logprobs")[: len(name) % 2 + 1]))
    assert not result.verdict.calibrated
    assert result.causes[0].kinds == kinds and result.causes[0].fits, result.causes


def test_a_min_p_that_is_left_on(check, behave):
    """Where each step has a few probable tokens, a top-p may leave the same ones; then both are named."""
    result = check(behave(cut=min_p(0.1)))
    assert not result.verdict.calibrated
    likely = [result.causes[0], *as_likely(result.causes)]
    assert result.causes[0].fits and ("min-p",) in [cause.kinds for cause in likely], result.causes


def test_a_temperature_with_a_top_p(check, behave):
    cut = lambda log_probs: top_p(0.95)(_normalised(log_probs / 0.6))  # noqa: E731
    result = check(behave(cut=cut), num=MORE)
    assert not result.verdict.calibrated
    assert result.causes[0].kinds == ("temperature", "top-p") and result.causes[0].fits, result.causes


def _normalised(log_probs):
    return log_probs - np.logaddexp.reduce(log_probs)


def test_the_temperature_is_estimated(check, behave):
    temperature = check(behave(cut=tempered(0.6))).verdict.temperature
    assert abs(temperature.value - 0.6) < 3 * temperature.error and temperature.error < 0.05


@pytest.mark.parametrize("can", [("n", "logprobs"), ("n",)], ids=["logprobs", "text alone"])
def test_the_base_model_answers(check, behave, next_tokens, calibrated_run, can):
    base = from_pretrained(str(calibrated_run / "base"), dtype="float32", param_dtype="float32")
    result = check(behave(model=next_tokens(base), can=can))
    assert not result.verdict.calibrated
    assert result.causes[0].kinds == (advice.BASE,) and result.causes[0].fits, result.causes


WRONG_PROMPTS = {
    "thinking mode on": {"enable_thinking": True},
    "doubled BOS": {"duplicate_bos": True},
    "system prompt": {},
}


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_another_prompt_reaches_the_model(check, behave, config, tokenizer, name):
    options = dataclasses.replace(ChatOptions.from_config(config.data), **WRONG_PROMPTS[name])
    system = [{"role": "system", "content": SYSTEM}] if name == "system prompt" else []
    result = check(behave(encode=lambda messages: encode_chats(tokenizer, [[*system, *messages]], options)[0]))
    assert not result.verdict.calibrated
    assert result.causes[0].kinds == (name,) and result.causes[0].fits, result.causes


def test_a_doubled_bos_shows_in_text_alone(check, behave, config, tokenizer):
    options = dataclasses.replace(ChatOptions.from_config(config.data), duplicate_bos=True)
    wrong = behave(encode=lambda messages: encode_chats(tokenizer, [messages], options)[0], can=("n",))
    result = check(wrong, num=MORE)
    assert not result.verdict.calibrated and result.causes[0].kinds == ("doubled BOS",), result.causes


def test_a_system_prompt_of_its_own(check, behave, config, tokenizer):
    options, system = ChatOptions.from_config(config.data), {"role": "system", "content": "0.1 1.2 2.3"}
    result = check(behave(encode=lambda messages: encode_chats(tokenizer, [[system, *messages]], options)[0]))
    assert not result.verdict.calibrated and result.causes[0].kinds == (advice.PROMPT,), result.causes


def test_the_stop_token_is_missing(check, behave, tokenizer):
    result = check(behave(stop_ids=(10**6,)))
    assert not result.verdict.calibrated
    assert result.causes[0].kinds == ("stop token",) and result.causes[0].fits, result.causes


def test_every_request_gets_the_same_draws(check, behave):
    result = check(behave(fixed_seed=True))
    assert not result.verdict.calibrated and result.causes[0].kinds == (advice.REPEATED,)


@pytest.mark.parametrize(("can", "num"), [(("n", "logprobs"), NUM), (("n",), 2 * MORE)], ids=["logprobs", "text alone"])
def test_quantised_weights(check, behave, trained, next_tokens, can, num):
    def rounded(weights):
        if weights.ndim < 2:
            return weights
        step = jnp.max(jnp.abs(weights), axis=0, keepdims=True) / 3  # three bits, a scale per column
        return jnp.round(weights / step) * step

    graphdef, state = nnx.split(trained)
    quantised = nnx.merge(graphdef, jax.tree.map(rounded, state))
    result = check(behave(model=next_tokens(quantised), can=can), num=num)
    assert not result.verdict.calibrated
    assert result.causes[0].kinds == (advice.MOVED,), result.causes
    assert "logprobs" not in can or 0.01 < result.causes[0].kl < 3
