"""The transformer's own promises: caches, bfloat16, strict dtypes and ranks, dropout of the adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cft_jax.models.config import LayerSpec, LoraSpec, ModelConfig, Moe, Rope
from cft_jax.models.dropout import Noise

LOCAL, FULL = LayerSpec(6, Rope(40.0)), LayerSpec(None, Rope(500.0))
CONFIG = ModelConfig(
    num_layers=3,
    embed_dim=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=61,
    layer_pattern=(LOCAL, FULL),
    mlp=Moe(hidden_dim=14, num_experts=4, num_experts_per_token=2, swiglu_limit=7.0, swiglu_alpha=1.702),
    norm_eps=1e-5,
    attn_scale=8**-0.5,
    tie_head=False,
    attn_bias=True,
    attn_sinks=True,
)
# Float32 in another order of summation, on any CPU: a hundred units in the last place of numbers up to 16.
ROUNDING = 1e-4
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (4, 25)))


@pytest.fixture
def make(random_model):
    return functools.partial(random_model, CONFIG)


@nnx.jit
def run(model, tokens, positions, subtree_end, context=(), key=None):
    hidden, cache = model.hidden(tokens, positions, subtree_end, context=context, key=key)
    return model.logits(hidden), cache


def test_decoding_equals_prefill_beyond_the_window(make):
    """A prompt of 9, shared by two rows each, one token, then the rest: three windows in all."""
    model = make()
    rows = TOKENS.at[1, :9].set(TOKENS[0, :9]).at[3, :9].set(TOKENS[2, :9])
    expected = model(rows)
    positions = jnp.arange(25)[None].repeat(4, 0)
    context, start = (), 0
    for stop in (9, 10, 25):
        step = slice(None, None, 2) if start == 0 else slice(None)
        tokens = rows[step, start:stop]
        logits, new = run(model, tokens, positions[step, start:stop], jnp.full(tokens.shape, stop - start), context)
        np.testing.assert_allclose(logits, expected[step, start:stop], atol=ROUNDING, rtol=0, err_msg=str(stop))
        context, start = (*context, new), stop


def test_a_packed_tree_gives_the_logits_of_its_strings(make):
    """Prompt p of 8 tokens, then below it a-b-c and a-d: one row for both strings."""
    model = make()
    prompt, (a, b, c, d) = TOKENS[0, :8], TOKENS[1, :4]
    row = jnp.concatenate([prompt, jnp.array([a, b, c, d])])[None]
    subtree_end = jnp.array([[12] * 8 + [12, 11, 11, 12]])
    positions = jnp.array([[*range(8), 8, 9, 10, 9]])
    packed, _ = run(model, row, positions, subtree_end)
    abc = model(jnp.concatenate([prompt, jnp.array([a, b, c])])[None])
    ad = model(jnp.concatenate([prompt, jnp.array([a, d])])[None])
    np.testing.assert_allclose(packed[0, :11], abc[0], atol=ROUNDING, rtol=0)
    np.testing.assert_allclose(packed[0, 11], ad[0, 9], atol=ROUNDING, rtol=0)


def test_the_forward_pass_promotes_no_dtypes_and_no_ranks(make):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        lora = LoraSpec(rank=2, alpha=4.0, dropout=0.1, targets=("q_proj", "down_proj"))
        logits, _ = run(
            make(lora=lora, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
            TOKENS,
            jnp.arange(25)[None].repeat(4, 0),
            jnp.full((4, 25), 25),
            key=jax.random.key(0),
        )
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_bit_of_the_forward_pass(make, remat):
    np.testing.assert_array_equal(make(remat=remat)(TOKENS), make()(TOKENS))


def test_unknown_rematerialisation_is_refused(make):
    with pytest.raises(ValueError, match="remat='some'"):
        make(remat="some")


def test_dropout_needs_a_key(make):
    lora = LoraSpec(rank=2, alpha=4.0, dropout=0.5, targets=("q_proj", "gate_up_proj"))
    model = make(lora=lora)
    positions, subtree_end = jnp.arange(25)[None].repeat(4, 0), jnp.full((4, 25), 25)
    np.testing.assert_allclose(run(model, TOKENS, positions, subtree_end)[0], model(TOKENS), atol=ROUNDING, rtol=0)
    first, again, other = (run(model, TOKENS, positions, subtree_end, key=jax.random.key(s))[0] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - model(TOKENS)).max() > 1e-3


def test_dropout_spares_the_mean_and_differs_between_layers(make):
    lora = LoraSpec(rank=2, alpha=4.0, dropout=0.25, targets=("q_proj", "k_proj"))
    attention = make(lora=lora).stacks[0][0].attn
    x, noise = jnp.ones((100, 100, 24)), Noise(jax.random.key(0), jnp.arange(10_000).reshape(100, 100))
    (q, scale), (k, _) = (attention.q_proj.lora.input(x, noise.of(name)) for name in ("attention", "o_proj"))
    np.testing.assert_array_equal(np.unique(q), [0, 1])
    # Standard error of the mean of 240,000 draws: 0.0009; the adapter's scale is 2.
    assert abs(float(q.mean()) * scale - 2) < 0.01
    # Independent draws agree in 0.25^2 + 0.75^2 of the places.
    assert abs(float((q == k).mean()) - 0.625) < 0.006
