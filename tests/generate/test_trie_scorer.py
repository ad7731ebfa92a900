import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from cft_jax.common.errors import UserError
from cft_jax.generate import TrieScorer, score_trie, vocabulary
from cft_jax.generate import trie_scorer as score
from cft_jax.generate.vocabulary import Tiling, log_z, tile_log_sum_exps
from cft_jax.models.config import LoraSpec
from cft_jax.sharding.mesh import make_mesh

# Float32 in another order of summation, on any CPU: fifty units in the last place of log-probabilities up to 32.
ROUNDING = 1e-4
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_oss")
# Of the tries that `make_trie` makes.
TERMINATOR = 3
PROMPT = [11, 60, 4, 9, 33, 2, 71, 8, 20, 5, 19, 44, 27]


def alone(model, prompt, strings, end=TERMINATOR):
    """Log-probability of every string followed by `end`, each run by itself through the whole model."""
    rows = [[*prompt, *string, end] for string in strings]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], bool)
    log_probs = np.asarray(jax.nn.log_softmax(model(tokens, mask=mask)), np.float64)
    return np.array(
        [sum(log_probs[r, t - 1, row[t]] for t in range(len(prompt), len(row))) for r, row in enumerate(rows)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_string_scores_as_it_does_alone(family, make_model, make_trie, random_strings, monkeypatch):
    # Rows of 16 tokens: 60 strings take more than ten of them, cut inside subtrees.
    monkeypatch.setattr(score, "ROW_LENGTHS", (16,))
    model, strings = make_model(family), random_strings(60, seed=1)
    got = score_trie(model, PROMPT, make_trie(strings))
    want = alone(model, PROMPT, strings)
    assert got.dtype == np.float64
    assert np.ptp(want) > 5
    np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_the_mass_off_the_support_sum_to_one(family, make_model, make_trie):
    model = make_model(family)
    # A likely terminator and every other token as a string of its own put some percent of the mass on the support.
    first = np.asarray(jax.nn.softmax(model(np.array([PROMPT]))[0]))
    end = int(first.mean(axis=0).argmax())
    strings = [(token,) for token in range(model.config.vocab_size) if token != end]
    scores = TrieScorer(model).score([PROMPT], [make_trie(strings, end)])[0]
    # By the whole model: text that ends at once, or goes on after its first token.
    then = np.asarray(jax.nn.softmax(model(np.array([[*PROMPT, *string] for string in strings]))[:, -1]), np.float64)
    goes_on = first[-1, [token for (token,) in strings]] @ (1 - then[:, end])
    support = np.exp(scores.string_log_probs).sum()
    assert support > 10 * ROUNDING
    assert support + first[-1, end] + goes_on == pytest.approx(1, abs=ROUNDING)


def test_prompts_of_all_lengths_and_tries_of_all_sizes_together(make_model, make_trie, random_strings):
    model = make_model("gemma3")
    prompts = [PROMPT[:1], PROMPT, PROMPT * 5, PROMPT[2:4], PROMPT * 4]
    strings = [random_strings(n, seed=n) for n in (3, 80, 25, 300, 1)]
    scores = TrieScorer(model, tokens_per_call=512).score(prompts, [make_trie(s) for s in strings])
    for prompt, listed, found in zip(prompts, strings, scores, strict=True):
        np.testing.assert_allclose(found.string_log_probs, alone(model, prompt, listed), rtol=0, atol=ROUNDING)


def test_long_prompts_are_prefilled_in_pieces(make_model, make_trie, random_strings, monkeypatch):
    monkeypatch.setattr("cft_jax.generate.prefill.PIECE", 16)
    model, strings = make_model("llama"), random_strings(5, seed=3)
    prompts = [np.random.default_rng(n).integers(5, 90, n).tolist() for n in (101, 70)]
    scores = TrieScorer(model).score(prompts, [make_trie(strings)] * 2)
    for prompt, found in zip(prompts, scores, strict=True):
        np.testing.assert_allclose(found.string_log_probs, alone(model, prompt, strings), rtol=0, atol=ROUNDING)


def test_other_stop_ids_are_scored_apart(make_model, make_trie, random_strings):
    model, strings = make_model("qwen3"), random_strings(12, seed=4)
    trie = make_trie(strings)
    scores = TrieScorer(model, stop_ids=(1, TERMINATOR, 7)).score([PROMPT], [trie])[0]
    want = np.logaddexp(alone(model, PROMPT, strings, end=1), alone(model, PROMPT, strings, end=7))
    np.testing.assert_allclose(scores.other_stop_log_probs, want, rtol=0, atol=ROUNDING)
    plain = TrieScorer(model).score([PROMPT], [trie])[0]
    assert (plain.other_stop_log_probs == -np.inf).all()
    np.testing.assert_allclose(scores.string_log_probs, plain.string_log_probs, rtol=0, atol=ROUNDING)


def test_some_prefixes_only(make_model, make_trie, random_strings):
    model, trie = make_model("llama"), make_trie(random_strings(60, seed=5))
    whole = TrieScorer(model).score([PROMPT], [trie])[0].child_log_probs
    leaf = int(trie.leaf_prefix[7])
    path = [leaf]
    while path[-1]:
        path.append(int(trie.parent[path[-1]]))
    some = TrieScorer(model).score([PROMPT], [trie], prefixes=[np.array(path)])[0]
    asked = np.isin(np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets)), path)
    np.testing.assert_allclose(some.child_log_probs[asked], whole[asked], rtol=0, atol=ROUNDING)
    assert np.isnan(some.child_log_probs[~asked]).all()
    assert np.isfinite(some.string_log_probs[7])
    assert np.isnan(some.string_log_probs).sum() == np.isnan(some.other_stop_log_probs).sum() > 0
    with pytest.raises(ValueError, match="ancestors"):
        TrieScorer(model).score([PROMPT], [trie], prefixes=[np.array([0, leaf])])


def test_mesh_and_unmerged_adapters(make_model, make_trie, random_strings):
    lora = LoraSpec(rank=2, alpha=4.0, dropout=0.1, targets=("q_proj", "o_proj", "down_proj"))
    tries = [make_trie(random_strings(n, seed=n)) for n in (30, 15, 9)]
    prompts = [PROMPT, PROMPT[:5], PROMPT[3:]]
    one = TrieScorer(make_model("llama", lora=lora)).score(prompts, tries)
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    many = TrieScorer(make_model("llama", lora=lora, mesh=mesh)).score(prompts, tries)
    bare = TrieScorer(make_model("llama")).score(prompts, tries)
    for a, b, c in zip(one, many, bare, strict=True):
        np.testing.assert_allclose(a.string_log_probs, b.string_log_probs, rtol=0, atol=ROUNDING)
        assert np.abs(a.string_log_probs - c.string_log_probs).max() > 0.01


@pytest.mark.parametrize("vocab, shards", [(331, 1), (97, 1), (1024, 1), (264, 2)])
def test_tiles_hold_every_token_once(vocab, shards):
    tiling = Tiling(shards, vocab // shards)
    tokens, exist = (np.asarray(x) for x in tiling.tokens(jnp.arange(shards * tiling.tiles)))
    assert sorted(tokens[exist].tolist()) == list(range(vocab))
    assert tokens.min() >= 0 and tokens.max() < vocab


@pytest.mark.parametrize(
    "above", [0.0, -5.0, -120.0], ids=["the largest", "below it", "so far below that sums overflow"]
)
def test_log_z_whatever_they_are_relative_to(above, make_model):
    model = make_model("gemma3")
    hidden = jax.random.normal(jax.random.key(5), (600, model.config.embed_dim))
    logits = np.asarray(model.logits(hidden), np.float64)
    # The last rows do not count, and infinities there do no harm.
    near = jnp.where(jnp.arange(600) < 590, jnp.asarray(logits.max(axis=1) + above, jnp.float32), -jnp.inf)
    found = np.asarray(log_z(model, hidden, jnp.int32(590), near))[:590]
    np.testing.assert_allclose(found, logsumexp(logits[:590], axis=1), rtol=0, atol=ROUNDING)


# 128 scores and 2**20: blocks of a single tile with a remainder, and one block that is nearly the whole vocabulary.
@pytest.mark.parametrize("scores", [128, 1 << 20])
def test_tile_sums_are_those_of_the_logits(scores, make_model, monkeypatch):
    monkeypatch.setattr(vocabulary, "_SCORES_CPU", scores)
    model = make_model("gemma3")
    hidden = jax.random.normal(jax.random.key(5), (300, model.config.embed_dim))
    floor = jnp.where(jnp.arange(300) % 2 == 0, -jnp.inf, 0.1)
    log_sum_exps = np.asarray(tile_log_sum_exps(model, hidden, jnp.int32(290), jnp.float32(1 / 0.7), floor))
    logits = np.asarray(model.logits(hidden), np.float64)
    logits = np.where(logits >= np.asarray(floor)[:, None], logits, -np.inf)[:290] / 0.7
    tiling = Tiling.of(model)
    for tile, (tokens, exist) in enumerate(zip(*tiling.tokens(jnp.arange(tiling.tiles)), strict=True)):
        want = logsumexp(logits[:, np.asarray(tokens)[np.asarray(exist)]], axis=1)
        np.testing.assert_allclose(log_sum_exps[:290, tile], want, rtol=0, atol=ROUNDING)


def test_refused_inputs(make_model, make_trie):
    model = make_model("qwen3")
    trie = make_trie([(5, 6), (7,)])
    with pytest.raises(UserError, match="prompt 0 is empty"):
        score_trie(model, [], trie)
    with pytest.raises(UserError, match="token 97"):
        score_trie(model, [5, 97], trie)
    with pytest.raises(UserError, match="token 200"):
        score_trie(model, [5], make_trie([(5, 200)]))
