"""Small models of the four families' shapes, and tries of any strings of tokens."""

import functools
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from cft_jax.models.config import (
    GatedMlp,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LoraSpec,
    ModelConfig,
    Moe,
    Rope,
    YarnScaling,
)
from cft_jax.models.transformer import Transformer
from cft_jax.text.trie import Trie, grow_forest, token_matrix

TERMINATOR = 3
# All sizes differ from each other, so that no axis can stand in for another.
_SIZES = {"embed_dim": 40, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8, "norm_eps": 1e-6, "attn_scale": 0.4}
_LLAMA = LayerSpec(None, Rope(1e4, Llama3Scaling(4.0, 1.0, 2.0, 16)))
_QWEN = LayerSpec(None, Rope(1e6))
_GEMMA = (LayerSpec(5, Rope(1e4)), LayerSpec(None, Rope(1e5, LinearScaling(8.0))))
_GPT_OSS_ROPE = Rope(1.5e4, YarnScaling(8.0, 32.0, 1.0, 16, False, 1.2))
_GPT_OSS = (LayerSpec(7, _GPT_OSS_ROPE), LayerSpec(None, _GPT_OSS_ROPE))

CONFIGS = {
    "llama": ModelConfig(
        num_layers=2, vocab_size=331, layer_pattern=(_LLAMA,), mlp=GatedMlp(52, "silu"), tie_head=True, **_SIZES
    ),
    "qwen3": ModelConfig(
        num_layers=2, vocab_size=97, layer_pattern=(_QWEN,), mlp=GatedMlp(52, "silu"), tie_head=False, qk_norm=True,
        **_SIZES,
    ),
    "gemma3": ModelConfig(
        num_layers=3, vocab_size=331, layer_pattern=_GEMMA, mlp=GatedMlp(52, "gelu_tanh"), tie_head=True, qk_norm=True,
        post_norms=True, norm_offset=1.0, embed_scale=3.0, final_softcap=9.0, **_SIZES,
    ),
    "gpt_oss": ModelConfig(
        num_layers=2, vocab_size=131, layer_pattern=_GPT_OSS, mlp=Moe(28, 5, 2, 7.0, 1.702), tie_head=False,
        attn_bias=True, attn_sinks=True, **_SIZES,
    ),
    # So few tokens that all short texts can be listed.
    "few_tokens": ModelConfig(
        num_layers=1, vocab_size=13, layer_pattern=(_QWEN,), mlp=GatedMlp(52, "silu"), tie_head=False, **_SIZES
    ),
}  # fmt: skip


def _weights(rng: np.random.Generator, name: str, shape: tuple[int, ...], norm: float) -> jax.Array:
    """Random values: logits of a standard deviation above 1, activations near 1, nothing zero."""
    size = {"kernel": 0.2, "a": 0.2, "b": 0.2, "embed": 0.25, "head": 0.25}.get(name, 0.3)
    centre = norm if name == "scale" else 0.0
    return jnp.asarray(centre + size * rng.standard_normal(shape), jnp.float32)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """Models by family, float32, the same weights for the same arguments."""

    @functools.cache
    def make(family: str, *, lora: LoraSpec | None = None, mesh: Mesh | None = None) -> Transformer:
        def build() -> Transformer:
            return Transformer(
                CONFIGS[family], lora=lora, dtype=jnp.float32, param_dtype=jnp.float32, mesh=mesh, rngs=nnx.Rngs(0)
            )

        graphdef, state = nnx.split(nnx.eval_shape(build))
        rng = np.random.default_rng(zlib.crc32(family.encode()))
        # Adapters come last, so that they do not change the other weights.
        flat = sorted(nnx.to_flat_state(state), key=lambda item: ("lora" in item[0], str(item[0])))
        norm = 1 - CONFIGS[family].norm_offset
        drawn = [(path, leaf.replace(_weights(rng, str(path[-1]), leaf.shape, norm))) for path, leaf in flat]
        return nnx.merge(graphdef, nnx.from_flat_state(drawn))

    return make


@pytest.fixture(scope="session")
def make_trie() -> Callable[..., Trie]:
    """The trie of equally probable strings of tokens."""

    def make(strings: Sequence[Sequence[int]], terminator_id: int = TERMINATOR) -> Trie:
        tokens, lengths = token_matrix(strings)
        count = len(strings)
        groups, probabilities = np.zeros(count, np.int64), np.full(count, 1 / count)
        return grow_forest(tokens, lengths, groups, probabilities, terminator_id=terminator_id, describe=str).trie(0)

    return make


@pytest.fixture(scope="session")
def random_strings() -> Callable[..., list[tuple[int, ...]]]:
    """Different strings over a few tokens, as numbers are: prefixes shared, lengths mixed, in random order."""

    def make(count: int, *, seed: int, longest: int = 6, alphabet: int = 10) -> list[tuple[int, ...]]:
        rng = np.random.default_rng(seed)
        found: dict[tuple[int, ...], None] = {}
        while len(found) < count:
            found[tuple(rng.integers(5, 5 + alphabet, rng.integers(1, longest + 1)).tolist())] = None
        return list(found)

    return make
