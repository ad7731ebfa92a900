"""The softmax over the whole vocabulary in tiles of tokens, so that no array of rows times vocabulary is needed.

A block of scores that stays in the processor's cache is made, reduced to one log-sum-exp per tile of 128 tokens, and
forgotten. The tiles' masses give the normaliser; they are also the first level of a two-level inverse CDF, for which
only the scores of the chosen tile are made again (`cft_jax.generate.sampling`).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cft_jax.models.layers import einsum
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.rules import constrain, partition_spec

TILE = 128
# Rows of hidden states per pass over the vocabulary.
ROWS = 256
# Scores per block. 2**20 (4 MiB) stay in a CPU's cache: 3 times as fast as blocks of 2**24 (measured, 2 cores,
# vocabulary 151,936, width 64). Accelerators want few and large matrix products.
_SCORES_CPU, _SCORES = 1 << 20, 1 << 25


@dataclass(frozen=True)
class Tiling:
    """The vocabulary cut into the mesh's shards, and these into tiles, the last of which may be incomplete.

    Attributes:
      shards: parts of equal size, one for each device along the vocabulary.
      shard: tokens of a part.
    """

    shards: int
    shard: int

    @classmethod
    def of(cls, model: Transformer) -> "Tiling":
        vocab, shards = model.config.vocab_size, 1
        if model.mesh is not None and partition_spec((vocab,), ("vocab",), model.mesh)[0] is not None:
            shards = model.mesh.shape["tensor"]
        return cls(shards, vocab // shards)

    @property
    def tiles(self) -> int:
        """Tiles of a shard."""
        return math.ceil(self.shard / TILE)

    def tokens(self, tile: Int[Array, "*B"]) -> tuple[Int[Array, "*B W"], Bool[Array, "*B W"]]:
        """The token ids of tiles, and which of them there are."""
        shard, place = jnp.divmod(tile, self.tiles)
        within = place[..., None] * TILE + jnp.arange(TILE)
        exists = within < self.shard
        return shard[..., None] * self.shard + jnp.where(exists, within, 0), exists


def tile_log_masses(
    model: Transformer,
    hidden: Float[Array, "R D"],
    count: Int[Array, ""],
    temperature: Float[Array, ""],
    floor: Float[Array, "R"] | None = None,
) -> Float[Array, "R U"]:
    """The logarithm of Σ exp(score / temperature) over every tile, float32, for the first `count` rows.

    Args:
      model: the language model.
      hidden: states after the final norm.
      count: blocks of rows beyond it are not computed, and zero.
      temperature: greater than 0.
      floor: of each row's scores (before the temperature); tokens below it do not count.

    Returns:
      One column per tile, in the order of `Tiling.tokens`; very small where no token of a tile counts.
    """
    tiling, rows = Tiling.of(model), min(hidden.shape[0], ROWS)
    kernel = model.head_kernel().reshape(tiling.shards, tiling.shard, hidden.shape[1])
    floor = jnp.full(hidden.shape[0], -jnp.inf) if floor is None else floor
    scores = _SCORES_CPU if jax.default_backend() == "cpu" else _SCORES
    width = min(max(scores // (rows * tiling.shards), TILE), tiling.shard) // TILE * TILE
    whole = tiling.shard // width if width else 0

    def masses(some: Float[Array, "r D"], lowest: Float[Array, "r"], part: Float[Array, "S W D"]) -> Array:
        part = constrain(part.astype(some.dtype), ("vocab", None, "act_embed"), model.mesh)
        found = capped(model, einsum("RD,SWD->RSW", some, part, out_dtype=jnp.float32))
        found = jnp.where(found >= lowest[:, None, None], found, -jnp.inf) / temperature
        found = jnp.pad(found, ((0, 0), (0, 0), (0, -found.shape[-1] % TILE)), constant_values=-jnp.inf)
        tiled = found.reshape(*found.shape[:2], -1, TILE)
        peak = jnp.maximum(jnp.max(tiled, axis=-1), jnp.finfo(jnp.float32).min)
        return peak + jnp.log(jnp.sum(jnp.exp(tiled - peak[..., None]), axis=-1))

    def of_rows(some: Float[Array, "r D"], lowest: Float[Array, "r"]) -> Float[Array, "r U"]:
        def of_block(block: Int[Array, ""]) -> Array:
            return masses(some, lowest, jax.lax.dynamic_slice_in_dim(kernel, block * width, width, axis=1))

        blocks = jnp.moveaxis(jax.lax.map(of_block, jnp.arange(whole)), 0, 2) if whole else None
        parts = [] if blocks is None else [blocks.reshape(rows, tiling.shards, -1)]
        if whole * width < tiling.shard:
            parts.append(masses(some, lowest, kernel[:, whole * width :]))
        return jnp.concatenate(parts, axis=-1).reshape(rows, -1)

    return map_rows(of_rows, rows, count, hidden, floor)


def map_rows(function, rows: int, count: Int[Array, ""], *arrays: Array):
    """`function` on blocks of so many rows of the arrays, as far as the first `count` rows reach; zero beyond."""
    total = arrays[0].shape[0]
    padded = [jnp.pad(x, ((0, -total % rows), *((0, 0),) * (x.ndim - 1))) for x in arrays]

    def block(i: Int[Array, ""]):
        return function(*(jax.lax.dynamic_slice_in_dim(x, i * rows, rows) for x in padded))

    def add(i: Int[Array, ""], out):
        return jax.tree.map(lambda o, n: jax.lax.dynamic_update_slice_in_dim(o, n, i * rows, axis=0), out, block(i))

    shapes = jax.eval_shape(block, jnp.int32(0))
    start = jax.tree.map(lambda x: jnp.zeros((padded[0].shape[0], *x.shape[1:]), x.dtype), shapes)
    return jax.tree.map(lambda x: x[:total], jax.lax.fori_loop(0, (count + rows - 1) // rows, add, start))


def token_scores(model: Transformer, hidden: Float[Array, "N D"], ids: Int[Array, "N W"]) -> Float[Array, "N W"]:
    """float32 scores (logits) of the given tokens, for each row its own."""
    rows = constrain(model.head_kernel()[ids].astype(hidden.dtype), ("batch", None, "act_embed"), model.mesh)
    return capped(model, einsum("ND,NWD->NW", hidden, rows, out_dtype=jnp.float32))


def capped(model: Transformer, scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """`scores` with the model's final soft-cap, where it has one."""
    cap = model.config.final_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)
