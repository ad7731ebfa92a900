"""Likelihoods of packed texts against each text alone, by the whole model and by transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cft_jax.checkpoints import from_pretrained
from cft_jax.common.errors import UserError
from cft_jax.generate import TextScorer
from cft_jax.generate import text_scorer as likelihood
from cft_jax.models.config import LoraSpec
from cft_jax.sharding.mesh import make_mesh

# 1e-4: float32 in another order of summation, by torch or on any CPU, sums of up to 9 tokens.
TOLERANCE = 1e-4


def texts(*lengths, seed=0, vocab=80):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocab, length).tolist() for length in lengths]


def asked(seed=0, vocab=80):
    """Requests in mixed order: three contexts, choices of all lengths, one of them empty, one asked twice."""
    contexts = texts(13, 1, 70, seed=seed, vocab=vocab)
    choices = texts(1, 4, 9, 2, 1, 7, seed=seed + 1, vocab=vocab)
    pairs = [(contexts[c], choices[k]) for k, c in [(0, 2), (1, 0), (2, 2), (3, 1), (4, 0), (5, 2), (1, 0), (2, 1)]]
    return [*pairs[:3], (contexts[0], []), *pairs[3:]]


def alone(log_probs_of, context, continuation):
    """Log-probability and greediness of one continuation from float64[T, V] log-probabilities of the whole text."""
    rows = log_probs_of([*context, *continuation])[len(context) - 1 : -1]
    total = sum(row[token] for row, token in zip(rows, continuation, strict=True))
    return total, [int(row.argmax()) for row in rows] == list(continuation)


def by_model(model):
    """Runs each text by itself, filled up on the right to one of two lengths, so that two programs are compiled."""

    def log_probs(tokens):
        width = 64 if len(tokens) <= 64 else 160
        logits = model(np.array([[*tokens, *[0] * (width - len(tokens))]]))[0, : len(tokens)]
        return np.asarray(jax.nn.log_softmax(logits), np.float64)

    return log_probs


def by_torch(model):
    def log_probs(tokens):
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1).numpy()

    return log_probs


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_equal_to_transformers(family, write_hf, hf_config, tmp_path):
    reference = by_torch(write_hf(tmp_path, hf_config(family)))
    scorer = TextScorer(from_pretrained(tmp_path, dtype=jnp.float32, param_dtype=jnp.float32), tokens_per_call=128)
    found = scorer.log_likelihoods(asked())
    want = [alone(reference, *request) for request in asked()]
    np.testing.assert_allclose([item.log_prob for item in found], [item[0] for item in want], atol=TOLERANCE)
    assert [item.greedy for item in found] == [item[1] for item in want]
    rows = texts(5, 64, 2, 1, 66, 17, seed=3)
    for row, log_probs in zip(rows, scorer.token_log_probs(rows), strict=True):
        assert log_probs.dtype == np.float32
        expected = reference(row)[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(log_probs, expected, atol=TOLERANCE)


@pytest.mark.slow
def test_greedy_continuations_are_found(make_model):
    # gemma3's softcap and several tiles of the vocabulary (331 tokens) with a remainder.
    model = make_model("gemma3")
    context = texts(11)[0]
    greedy = list(context)
    for _ in range(5):
        padded = np.array([greedy + [0] * (16 - len(greedy))])
        greedy.append(int(np.asarray(model(padded))[0, len(greedy) - 1].argmax()))
    best = greedy[len(context) :]
    wrong = [[token + 1 if k == place else token for k, token in enumerate(best)] for place in range(5)]
    found = TextScorer(model).log_likelihoods([(context, best), *((context, other) for other in wrong)])
    assert [item.greedy for item in found] == [True] + [False] * 5
    np.testing.assert_allclose(found[0].log_prob, alone(by_model(model), context, best)[0], atol=TOLERANCE)


@pytest.fixture
def packed_sizes(monkeypatch):
    """Sizes of the trees that were packed."""
    sizes, pack = [], likelihood.padded_rows

    def recorded(packed, **options):
        sizes.extend(tree.tokens.size for row in packed for tree in row)
        return pack(packed, **options)

    monkeypatch.setattr(likelihood, "padded_rows", recorded)
    return sizes


def test_choices_of_one_context_share_its_tokens(make_model, monkeypatch, packed_sizes):
    context, *choices = texts(40, 3, 1, 5, 2)
    requests = [(context, choice) for choice in choices]
    whole = TextScorer(make_model("qwen3")).log_likelihoods(requests)
    assert packed_sizes == [40 + 2 + 0 + 4 + 1]
    packed_sizes.clear()
    # Rows too short for all of them.
    monkeypatch.setattr(likelihood, "ROW_LENGTH", 44)
    parts = TextScorer(make_model("qwen3")).log_likelihoods(requests)
    assert len(packed_sizes) > 1 and max(packed_sizes) <= 44
    np.testing.assert_allclose([item.log_prob for item in parts], [item.log_prob for item in whole], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_questions_behind_the_same_examples_share_them(family, make_model, packed_sizes):
    model = make_model(family)
    examples, *questions = texts(33, 10, 10, 10, seed=7)
    choices = texts(3, 3, 1, seed=8)
    requests = [([*examples, *question], choice) for question in questions for choice in choices]
    # A text that others begin with, the same text with another seam, and a text of its own.
    requests += [(examples, questions[0][:2]), (examples[:5], examples[5:]), (texts(6, seed=9)[0], choices[0])]
    order = np.random.default_rng(1).permutation(len(requests))
    found = TextScorer(model).log_likelihoods([requests[i] for i in order])
    want = [alone(by_model(model), *requests[i]) for i in order]
    np.testing.assert_allclose([item.log_prob for item in found], [item[0] for item in want], atol=TOLERANCE)
    assert [item.greedy for item in found] == [item[1] for item in want]
    assert sorted(packed_sizes) == [6 + 2, 33 + 3 * (10 + 2 + 2)]


def test_long_texts_get_rows_of_their_own(make_model, monkeypatch):
    monkeypatch.setattr(likelihood, "ROW_LENGTH", 64)
    model = make_model("llama")
    rows = texts(30, 150, 20, 64, seed=5)
    for row, log_probs in zip(rows, TextScorer(model).token_log_probs(rows), strict=True):
        expected = by_model(model)(row)[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(log_probs, expected, atol=TOLERANCE)


def test_mesh_and_unmerged_adapters(make_model):
    lora = LoraSpec(rank=2, alpha=4.0, dropout=0.1, targets=("q_proj", "o_proj", "down_proj"))
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    one = TextScorer(make_model("llama", lora=lora)).log_likelihoods(asked())
    many = TextScorer(make_model("llama", lora=lora, mesh=mesh)).log_likelihoods(asked())
    bare = TextScorer(make_model("llama")).log_likelihoods(asked())
    assert [item.greedy for item in one] == [item.greedy for item in many]
    values = [[item.log_prob for item in found] for found in (one, many, bare)]
    np.testing.assert_allclose(values[0], values[1], atol=TOLERANCE)
    assert np.abs(np.subtract(values[0], values[2])).max() > 0.01


def test_whole_next_token_distributions(make_model):
    model = make_model("gemma3")
    prompts = texts(3, 40, 1, 33, seed=6)
    found = TextScorer(model).next_token_log_probs(prompts)
    assert found.dtype == np.float32 and found.shape == (4, model.config.vocab_size)
    for prompt, log_probs in zip(prompts, found, strict=True):
        np.testing.assert_allclose(log_probs, by_model(model)(prompt)[-1], atol=1e-5)


def test_mistakes(make_model):
    scorer = TextScorer(make_model("llama"))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        scorer.log_likelihoods([([5], [6]), ([], [6])])
    with pytest.raises(UserError, match="token 331"):
        scorer.log_likelihoods([([5], [331])])
    assert scorer.log_likelihoods([]) == [] and scorer.token_log_probs([[5]])[0].size == 0
