from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.generate import SamplingSettings
from cft_jax.generate.sampling import Draws, draw_tokens, request_key, uniforms
from cft_jax.generate.split_model import SplitModel

NUM_DRAWS = 20_000


def softmax(logits, temperature, top_p):
    """Probabilities in float64; top-p by sorting, as transformers does it."""
    scaled = np.asarray(logits, np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


def draws_of(rows, key=(1, 2), step=0):
    count = len(rows)
    keys = jnp.tile(jnp.asarray(key, jnp.uint32), (count, 1))
    return Draws(jnp.asarray(rows, jnp.int32), uniforms(keys, jnp.arange(count), jnp.full(count, step), steps=1)[:, 0])


@partial(jax.jit, static_argnames="method")
def _draw(split, hidden, num_rows, draws, num_draws, *, method, temperature, top_p):
    options = {"method": method, "temperature": temperature, "top_p": top_p}
    return draw_tokens(split.merge(), hidden, num_rows, draws, num_draws, **options)


def draw(model, hidden, draws, temperature, top_p, num_rows=None):
    settings = SamplingSettings(temperature, top_p)
    found = _draw(
        SplitModel.of(model), hidden, jnp.int32(num_rows or hidden.shape[0]), draws, jnp.int32(draws.row.shape[0]),
        method=settings.method, temperature=jnp.float32(temperature or 1), top_p=jnp.float32(top_p),
    )  # fmt: skip
    return np.asarray(found)


def chi_square(observed, probs):
    """p-value of counts, cells of fewer than 5 expected draws pooled."""
    expected = probs * observed.sum()
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    cells = [(observed[~rare], expected[~rare]), (observed[rare].sum(keepdims=True), expected[rare].sum(keepdims=True))]
    got, want = (np.concatenate(part) for part in zip(*cells, strict=True))
    return stats.chisquare(got[want > 0], want[want > 0]).pvalue


@pytest.mark.parametrize(
    "temperature, top_p", [(1, 1), (0.3, 1), (2, 1), (1, 0.9), (1, 0.3), (0.6, 0.95), (1.7, 0.5), (1, 0.999)]
)
def test_draws_follow_the_softmax(temperature, top_p, make_model):
    model = make_model("gemma3")  # 331 tokens are three tiles, the last of them incomplete; with a soft-cap
    hidden = jax.random.normal(jax.random.key(0), (40, model.config.embed_dim))
    logits = model.logits(hidden)
    for row in (3, 38):
        drawn = draw(model, hidden, draws_of([row] * NUM_DRAWS, key=(row, 5)), temperature, top_p)
        probs = softmax(logits[row], temperature, top_p)
        assert chi_square(np.bincount(drawn, minlength=331), probs) > 1e-3


@pytest.mark.slow
def test_rare_tokens_are_as_frequent_as_they_should_be(make_model):
    model = make_model("llama")
    hidden = jax.random.normal(jax.random.key(0), (1, model.config.embed_dim))
    probs = softmax(model.logits(hidden)[0], 1, 1)
    drawn = draw(model, hidden, draws_of([0] * 400_000), 1, 1)
    rare = np.argmin(np.abs(probs - 1e-3))
    count = (drawn == rare).sum()
    assert abs(count - 4e5 * probs[rare]) < 5 * np.sqrt(4e5 * probs[rare])


def test_a_draw_depends_on_its_hidden_state_and_numbers_alone(make_model):
    model = make_model("qwen3")
    hidden = jax.random.normal(jax.random.key(1), (9, model.config.embed_dim))
    rows = np.arange(300) % 9
    whole = draw(model, hidden, draws_of(rows), 1, 1)
    some = np.array([5, 288, 17, 100])
    part = Draws(*(x[some] for x in draws_of(rows)))
    assert (draw(model, hidden, part, 1, 1) == whole[some]).all()
    moved = Draws(jnp.zeros(1, jnp.int32), part.uniform[2:3])
    assert draw(model, hidden[8:9], moved, 1, 1) == whole[17]


def test_uniform_numbers_are_those_of_key_sample_and_step():
    count = 500
    key = jnp.tile(jnp.asarray(request_key(3, [1, 2], 0)), (count, 1))
    samples, zeros = jnp.arange(count), jnp.zeros(count, jnp.int32)
    whole = np.asarray(uniforms(key, samples, zeros, steps=4))
    np.testing.assert_array_equal(uniforms(key[:3], samples[7:10], zeros[:3] + 2, steps=1)[:, 0], whole[7:10, 2])
    assert len(np.unique(whole)) > 0.999 * whole.size
    assert stats.kstest(whole.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(whole.reshape(count, -1).T) - np.eye(8)).max() < 0.2
    other = jnp.tile(jnp.asarray(request_key(3, [1, 2], 1)), (count, 1))
    assert (np.asarray(uniforms(other, samples, zeros, steps=4)) != whole).mean() > 0.999


def test_greedy_takes_the_first_of_the_most_probable(make_model):
    model = make_model("gpt_oss")
    hidden = jax.random.normal(jax.random.key(2), (50, model.config.embed_dim))
    drawn = draw(model, hidden, draws_of(np.arange(50)), 0, 1)
    np.testing.assert_array_equal(drawn, np.argmax(model.logits(hidden), axis=-1))
    assert (draw(model, hidden * 0, draws_of(np.arange(50)), 0, 1) == 0).all()


def test_top_p_keeps_the_most_probable_token_and_equal_ones_together(make_model):
    model = make_model("qwen3")
    hidden = jax.random.normal(jax.random.key(3), (1, model.config.embed_dim))
    drawn = draw(model, hidden, draws_of([0] * 50), 1, 1e-6)
    assert (drawn == int(model.logits(hidden)[0].argmax())).all()
    equal = draw(model, hidden * 0, draws_of([0] * 3000), 1, 0.5)
    assert len(set(equal.tolist())) == 97


def test_rows_beyond_the_count_are_not_needed(make_model):
    model = make_model("llama")
    hidden = jax.random.normal(jax.random.key(4), (600, model.config.embed_dim))
    draws = draws_of(np.arange(100) % 30)
    few = draw(model, hidden.at[300:].set(jnp.nan), draws, 1, 1, num_rows=30)
    np.testing.assert_array_equal(few, draw(model, hidden[:30], draws, 1, 1))


def test_requests_have_keys_of_their_own():
    keys = {
        request_key(seed, prompt, occurrence).tobytes()
        for seed in (0, 1, 2**40)
        for prompt in ([1, 2], [2, 1], [1, 2, 0])
        for occurrence in (0, 1)
    }
    assert len(keys) == 18
    assert (request_key(7, [1, 2], 0) == request_key(7, (1, 2), 0)).all()


@pytest.mark.parametrize(
    "settings", [(-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0), (1, 1.5), (1, float("nan"))]
)
def test_refused_settings(settings):
    with pytest.raises(UserError, match=r"temperature=|top_p="):
        SamplingSettings(*settings)
