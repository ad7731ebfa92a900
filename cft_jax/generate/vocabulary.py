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
    """How the vocabulary is cut: into the mesh's shards, these into blocks of `width` tokens, these into tiles.

    The last block of a shard reaches back over the one before where the width does not divide the shard; tokens seen
    twice count in the earlier block alone.

    Attributes:
      shards: parts of equal size, one per device along the vocabulary.
      shard: tokens of a part.
      tile: tokens of a tile.
      width: tokens of a block, a multiple of `tile`.
    """

    shards: int
    shard: int
    tile: int
    width: int

    @classmethod
    def of(cls, model: Transformer, rows: int) -> "Tiling":
        """The tiling for so many rows at a time."""
        vocab, shards = model.config.vocab_size, 1
        if model.mesh is not None and partition_spec((vocab,), ("vocab",), model.mesh)[0] is not None:
            shards = model.mesh.shape["tensor"]
        shard = vocab // shards
        tile = min(TILE, shard)
        scores = _SCORES_CPU if jax.default_backend() == "cpu" else _SCORES
        width = min(max(scores // (rows * shards), tile), shard) // tile * tile
        return cls(shards, shard, tile, width)

    @property
    def blocks(self) -> int:
        return math.ceil(self.shard / self.width)

    @property
    def tiles(self) -> int:
        """Tiles in all."""
        return self.shards * self.blocks * (self.width // self.tile)

    def first(self, block: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The first token, within its shard, of blocks."""
        return jnp.minimum(block * self.width, self.shard - self.width)

    def tokens(self, tile: Int[Array, "*B"]) -> tuple[Int[Array, "*B W"], Bool[Array, "*B W"]]:
        """The token ids of tiles, and which of them count there."""
        per_block = self.width // self.tile
        shard, rest = jnp.divmod(tile, self.blocks * per_block)
        block, place = jnp.divmod(rest, per_block)
        within = (self.first(block) + place * self.tile)[..., None] + jnp.arange(self.tile)
        return shard[..., None] * self.shard + within, within >= (block * self.width)[..., None]


def tile_log_masses(
    model: Transformer, hidden: Float[Array, "R D"], count: Int[Array, ""], temperature: Float[Array, ""]
) -> tuple[Float[Array, "R U"], Tiling]:
    """The logarithm of Σ exp(score / temperature) over every tile, float32, for the first `count` rows.

    Args:
      model: the language model.
      hidden: states after the final norm.
      count: rows beyond it are not computed, and zero.
      temperature: greater than 0.
    """
    R, D = hidden.shape
    rows = min(R, ROWS)
    tiling = Tiling.of(model, rows)
    padded = jnp.pad(hidden, ((0, -R % rows), (0, 0)))
    kernel = model.head_kernel().reshape(tiling.shards, tiling.shard, D)

    def add_rows(i, masses):
        some = jax.lax.dynamic_slice_in_dim(padded, i * rows, rows)

        def of_block(block):
            first = tiling.first(block)
            part = jax.lax.dynamic_slice_in_dim(kernel, first, tiling.width, axis=1).astype(some.dtype)
            part = constrain(part, ("vocab", None, "act_embed"), model.mesh)
            scores = _capped(model, einsum("RD,SWD->RSW", some, part, out_dtype=jnp.float32)) / temperature
            if tiling.shard % tiling.width:
                scores = jnp.where(first + jnp.arange(tiling.width) >= block * tiling.width, scores, -jnp.inf)
            tiled = scores.reshape(rows, tiling.shards, -1, tiling.tile)
            peak = jnp.maximum(jnp.max(tiled, axis=-1), jnp.finfo(jnp.float32).min)
            return peak + jnp.log(jnp.sum(jnp.exp(tiled - peak[..., None]), axis=-1))

        of_blocks = jax.lax.map(of_block, jnp.arange(tiling.blocks))
        new = jnp.transpose(of_blocks, (1, 2, 0, 3)).reshape(rows, tiling.tiles)
        return jax.lax.dynamic_update_slice_in_dim(masses, new, i * rows, axis=0)

    start = jnp.zeros((padded.shape[0], tiling.tiles), jnp.float32)
    masses = jax.lax.fori_loop(0, (count + rows - 1) // rows, add_rows, start)
    return masses[:R], tiling


def token_scores(model: Transformer, hidden: Float[Array, "N D"], ids: Int[Array, "N W"]) -> Float[Array, "N W"]:
    """float32 scores (logits) of the given tokens, for each row its own."""
    rows = constrain(model.head_kernel()[ids].astype(hidden.dtype), ("batch", None, "act_embed"), model.mesh)
    return _capped(model, einsum("ND,NWD->NW", hidden, rows, out_dtype=jnp.float32))


def _capped(model: Transformer, scores: Float[Array, "..."]) -> Float[Array, "..."]:
    cap = model.config.final_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)
