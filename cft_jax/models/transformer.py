"""One decoder-only transformer for all families: embeddings, scanned layers, final norm, head."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from cft_jax.models.attention import Attention, Leaders, Segment, Surroundings, tree_visible
from cft_jax.models.config import GatedMlp, LoraSpec, ModelConfig
from cft_jax.models.dropout import Noise
from cft_jax.models.layers import RmsNorm, WeightInit, einsum, normal_param, stored
from cft_jax.models.mlp import Mlp
from cft_jax.models.moe import MoeMlp
from cft_jax.models.rope import cos_sin
from cft_jax.models.source import Source
from cft_jax.sharding.rules import constrain

REMAT = ("none", "full", "dots")
# What "dots" keeps: the products that take longest to make again. Queries, keys and values are made again in about the
# time that writing and reading them takes (Qwen3-1.7B on v6e).
_KEPT = ("o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


class KVCache(NamedTuple):
    """Keys and values of earlier tokens in every layer.

    `keys[s][p]` and `values[s][p]` belong to position p of the pattern in stack s. R may be smaller than the number
    of rows that attend (see `Segment`): one prompt's cache serves all its samples.

    Attributes:
      keys: arrays [L, R, S, K, H], rotated.
      values: arrays [L, R, S, K, H].
      positions: of the cached tokens.
      visible: which of them may be seen, by every query ([R, 1, S]) or by each ([R, B/R*T, S]).
    """

    keys: tuple[tuple[Float[Array, "L R S K H"], ...], ...]
    values: tuple[tuple[Float[Array, "L R S K H"], ...], ...]
    positions: Int[Array, "R S"]
    visible: Bool[Array, "R #Q S"]


class Block(nnx.Module):
    """Attention and feed-forward with their norms and residuals; weights carry a leading layer axis."""

    def __init__(self, config: ModelConfig, init: WeightInit) -> None:
        norm = functools.partial(RmsNorm, config, config.embed_dim, init.layers, init.dtype)
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.post_attn_norm = norm() if config.post_norms else None
        self.post_mlp_norm = norm() if config.post_norms else None
        self.attn = Attention(config, init)
        make_mlp = Mlp if isinstance(config.mlp, GatedMlp) else MoeMlp
        self.mlp = make_mlp(config.mlp, config.embed_dim, init)  # type: ignore[arg-type]

    def __call__(
        self, x: Float[Array, "B T D"], surroundings: Surroundings, *, noise: Noise | None, mesh: Mesh | None
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        """One layer; as `Attention.__call__`, but activations before the norm."""
        attended, new = self.attn(stored(self.attn_norm(x)), surroundings, noise=noise, mesh=mesh)
        x = x + (attended if self.post_attn_norm is None else self.post_attn_norm(attended))
        fed = self.mlp(self.mlp_norm(x), noise=noise, mesh=mesh)
        x = x + (fed if self.post_mlp_norm is None else self.post_mlp_norm(fed))
        return constrain(x, ("batch", "length", "act_embed"), mesh), new


class Transformer(nnx.Module):
    """The language model.

    Args:
      config: sizes and switches.
      lora: adapters on the layers it names, or None.
      dtype: of activations and matrix products, those of adapters too unless `lora.float32`; norms, softmax, router and
        the head's scores are float32.
      param_dtype: of the stored base weights; adapters are float32.
      remat: what the backward pass computes again: "none", "full" (whole layers) or "dots" (all but the
        largest matrix products).
      mesh: for sharding constraints; None on one device, an abstract one where only shapes are asked for.
      rngs: streams `params` and `lora`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        lora: LoraSpec | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.bfloat16,
        remat: str = "none",
        mesh: Mesh | AbstractMesh | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r} must be one of {', '.join(REMAT)}")
        V, D = config.vocab_size, config.embed_dim
        self.embed = normal_param(rngs.params(), (V, D), ("vocab", "embed"), D, param_dtype)
        self.stacks = nnx.List(
            nnx.List(Block(config, WeightInit(repeats, lora, param_dtype, rngs)) for _ in pattern)
            for repeats, pattern in config.stacks
        )
        self.final_norm = RmsNorm(config, D, None, param_dtype)
        self.head = None if config.tie_head else normal_param(rngs.params(), (V, D), ("vocab", "embed"), D, param_dtype)
        self.config, self.lora_spec = config, lora
        self.source: Source | None = None
        self.dtype, self.param_dtype, self.remat = jnp.dtype(dtype), jnp.dtype(param_dtype), remat
        # What computes has devices.
        self.mesh: Mesh | None = mesh  # type: ignore[assignment]

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B L"],
        positions: Int[Array | np.ndarray, "B L"] | None = None,
        mask: Bool[Array | np.ndarray, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Logits of every position, float32; jitted.

        Args:
          tokens: ids.
          positions: by default each row counts its real tokens from 0.
          mask: true at real tokens; padding may stand on either side and its logits mean nothing.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        return _all_logits(self, tokens, jnp.asarray(positions, jnp.int32), mask)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        subtree_end: Int[Array, "B T"],
        *,
        context: tuple[KVCache, ...] = (),
        key: Key[Array, ""] | None = None,
        leaders: Leaders | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Activations after the final norm, and the new keys and values.

        Args:
          tokens: ids.
          positions: for the rotary embedding and the windows.
          subtree_end: key j of a row is seen by its queries i with j <= i < subtree_end[j]; 0 at padding.
          context: caches of earlier tokens that the rows also attend to.
          key: dropout of the adapters; None switches it off.
          leaders: which rows begin others.

        Returns:
          hidden states in the model's dtype, and a cache of the tokens given (`visible`: those with subtree_end > 0).
        """
        x = self.embed[...][tokens].astype(self.dtype)
        if self.config.embed_scale != 1.0:
            # HF rounds the scale to the parameters' dtype before it multiplies (sqrt(1152) is 34 in bfloat16).
            x = x * jnp.asarray(self.config.embed_scale, self.param_dtype).astype(self.dtype)
        x = constrain(x, ("batch", "length", "act_embed"), self.mesh)
        # In the order of the layers, as every process of a run must compile the same program.
        ropes = dict.fromkeys(spec.rope for spec in self.config.layer_pattern)
        ropes = {rope: stored(cos_sin(rope, self.config.head_dim, positions)) for rope in ropes}
        visible, token = tree_visible(subtree_end), _token_numbers(subtree_end.shape, leaders)
        keys, values = [], []
        for s, (blocks, (repeats, pattern)) in enumerate(zip(self.stacks, self.config.stacks, strict=True)):
            graphdef, state = nnx.split(blocks)
            earlier = tuple((cache.keys[s], cache.values[s]) for cache in context)
            seeds = None if key is None else jax.random.split(jax.random.fold_in(key, s), repeats)

            def period(x, xs, graphdef=graphdef, pattern=pattern):
                state, earlier, seed = xs
                new = []
                for p, (block, spec) in enumerate(zip(nnx.merge(graphdef, state), pattern, strict=True)):
                    segments = tuple(
                        (Segment(k[p], v[p], cache.visible), cache.positions)
                        for (k, v), cache in zip(earlier, context, strict=True)
                    )
                    noise = None if seed is None else Noise(jax.random.fold_in(seed, p), token)
                    surroundings = Surroundings(
                        spec.window, ropes[spec.rope], positions, subtree_end, visible, segments, leaders
                    )
                    x, kv = block(x, surroundings, noise=noise, mesh=self.mesh)
                    new.append(kv)
                return x, new

            x, new = jax.lax.scan(self._rematerialised(period), x, (state, earlier, seeds))
            keys.append(tuple(k for k, _ in new))
            values.append(tuple(v for _, v in new))
        cache = KVCache(tuple(keys), tuple(values), positions, (subtree_end > 0)[:, None, :])
        return self.final_norm(x), cache

    def _rematerialised(self, period):
        if self.remat == "none":
            return period
        policy = None if self.remat == "full" else jax.checkpoint_policies.save_only_these_names(*_KEPT)
        return jax.checkpoint(period, policy=policy, prevent_cse=False)

    def head_kernel(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits: the embedding where they are tied."""
        return (self.embed if self.head is None else self.head)[...]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of hidden states, soft-capped where the model says so."""
        kernel = self.head_kernel().astype(hidden.dtype)
        return self.capped(einsum("...D,VD->...V", hidden, kernel, out_dtype=jnp.float32))

    def capped(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Products of hidden states and the head with the model's final soft-cap, where it has one."""
        cap = self.config.final_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)


def _token_numbers(shape: tuple[int, ...], leaders: Leaders | None) -> Int[Array, "B T"]:
    """For dropout: all leaders have the same numbers, other rows the same with leaders among them and without."""
    row = jnp.arange(shape[0])
    if leaders is not None:
        group, within = jnp.divmod(row, shape[0] // leaders.groups)
        row = jnp.where(within == 0, -1, row - group - 1)
    return row[:, None] * shape[1] + jnp.arange(shape[1])[None]


@nnx.jit
def _all_logits(
    model: Transformer, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B L V"]:
    subtree_end = jnp.where(mask, tokens.shape[1], 0)
    hidden, _ = model.hidden(tokens, positions, subtree_end)
    return model.logits(hidden)
