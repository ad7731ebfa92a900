"""The softmax over the whole vocabulary in tiles of tokens, so that no array of rows times vocabulary is needed.

A block of scores that stays in the processor's cache is made, reduced to one log-sum-exp per tile of 128 tokens, and
forgotten. The tiles' sums give log Z; they are also the first level of a two-level inverse CDF, for which
only the scores of the chosen tile are made again (`cft_jax.generate.sampling`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cft_jax.models.layers import einsum
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.mesh import platform
from cft_jax.sharding.rules import constrain, num_shards

TILE = 128
# Rows of hidden states per pass over the vocabulary: few where few are asked at a time, as in decoding; more make the
# matrix products faster (by a fifth, 2 CPU cores, width 64).
ROWS, _MANY_ROWS = 256, 512
# Targets whose rows of the head are gathered at a time.
_TARGETS = 1024
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
        vocab, shards = model.config.vocab_size, num_shards("vocab", model.mesh)
        return cls(1, vocab) if vocab % shards else cls(shards, vocab // shards)

    @property
    def tiles(self) -> int:
        """Tiles of a shard."""
        return math.ceil(self.shard / TILE)

    def tokens(self, tile: Int[Array, "*B"]) -> tuple[Int[Array, "*B W"], Bool[Array, "*B W"]]:
        """The token ids of tiles, and which of them there are."""
        shard, index = jnp.divmod(tile, self.tiles)
        within = index[..., None] * TILE + jnp.arange(TILE)
        exists = within < self.shard
        return shard[..., None] * self.shard + jnp.where(exists, within, 0), exists


def tile_log_sum_exps(
    model: Transformer,
    hidden: Float[Array, "R D"],
    count: Int[Array, ""],
    inverse_temperature: Float[Array, ""] | None = None,
    floor: Float[Array, "R"] | None = None,
) -> Float[Array, "R U"]:
    """The logarithm of Σ exp(score / temperature) over every tile, float32; rows and tiles as of `of_tiles`.

    Tokens whose score (before the temperature) is below their row's `floor` do not count; the result is very small
    where none of a tile does.
    """

    def log_sum_exps(scores: Float[Array, "r S U W"], *lowest: Float[Array, "r"]) -> Float[Array, "r S U"]:
        for low in lowest:
            scores = jnp.where(scores >= low[:, None, None, None], scores, -jnp.inf)
        return log_sum_exp(scores if inverse_temperature is None else scores * inverse_temperature)

    return of_tiles(model, hidden, count, log_sum_exps, *(() if floor is None else (floor,)))


def log_z(
    model: Transformer, hidden: Float[Array, "R D"], count: Int[Array, ""], near: Float[Array, "R"]
) -> Float[Array, "R"]:
    """The logarithm of Σ exp(score) over the vocabulary, float32; rows beyond the first `count` mean nothing.

    Sums are taken relative to `near`, the score of some token of each row, which spares a search for the largest score
    (a seventh of the time on 2 CPU cores); should another be so much larger that a sum overflows, all are made again
    relative to their largest.
    """

    def relative(scores: Float[Array, "r S U W"], near: Float[Array, "r"]) -> Float[Array, "r S 1"]:
        whole = scores.reshape(*scores.shape[:2], -1)
        return jnp.sum(jnp.exp(whole - near[:, None, None]), axis=-1, keepdims=True)

    sums = jnp.sum(of_tiles(model, hidden, count, relative, near, at_a_time=_MANY_ROWS), axis=-1)
    finite = jnp.isfinite(sums) | (jnp.arange(sums.size) >= count)
    return jax.lax.cond(
        jnp.all(finite),
        lambda: near + jnp.log(sums),
        lambda: jax.nn.logsumexp(tile_log_sum_exps(model, hidden, count), axis=-1),
    )


def log_sum_exp(scores: Float[Array, "*B W"]) -> Float[Array, "*B"]:
    """The logarithm of Σ exp(score) over the last axis; very small where all scores are -inf."""
    max_logit = jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(jnp.float32).min)
    return max_logit + jnp.log(jnp.sum(jnp.exp(scores - max_logit[..., None]), axis=-1))


def of_tiles(
    model: Transformer,
    hidden: Float[Array, "R D"],
    count: Int[Array, ""],
    reduce: Callable[..., Any],
    *rows: Array,
    at_a_time: int = ROWS,
) -> Any:
    """A reduction of the scores of every tile, for the first `count` rows of hidden states.

    Args:
      model: the language model.
      hidden: states after the final norm.
      count: blocks of rows beyond it are not computed, and zero.
      reduce: turns scores, float32[r, S, U, TILE] with -inf where a tile lacks a token, into arrays [r, S, U], or
        [r, S, 1] for a whole block.
      *rows: arrays with one entry per row, whose parts `reduce` also gets.
      at_a_time: rows per pass over the vocabulary.

    Returns:
      What `reduce` gives, as arrays [R, tiles], in the order of `Tiling.tokens`, or [R, blocks].
    """
    tiling, size = Tiling.of(model), min(hidden.shape[0], at_a_time)
    kernel = model.head_kernel().reshape(tiling.shards, tiling.shard, hidden.shape[1])
    scores = _SCORES_CPU if platform(model.mesh) == "cpu" else _SCORES
    width = min(max(scores // (size * tiling.shards), TILE), tiling.shard) // TILE * TILE
    whole = tiling.shard // width if width else 0

    def reduced(part: Float[Array, "S W D"], some: Float[Array, "r D"], *others: Array) -> Any:
        part = constrain(part.astype(some.dtype), ("vocab", None, "act_embed"), model.mesh)
        found = model.capped(einsum("RD,SWD->RSW", some, part, out_dtype=jnp.float32))
        found = jnp.pad(found, ((0, 0), (0, 0), (0, -found.shape[-1] % TILE)), constant_values=-jnp.inf)
        return reduce(found.reshape(*found.shape[:2], -1, TILE), *others)

    def of_rows(*some: Array) -> Any:
        def of_block(block: Int[Array, ""]) -> Any:
            return reduced(jax.lax.dynamic_slice_in_dim(kernel, block * width, width, axis=1), *some)

        parts = []
        if whole:
            blocks = jax.lax.map(of_block, jnp.arange(whole))
            parts.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(size, tiling.shards, -1), blocks))
        if whole * width < tiling.shard:
            parts.append(reduced(kernel[:, whole * width :], *some))
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1).reshape(size, -1), *parts)

    return map_rows(of_rows, size, count, hidden, *rows)


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
    return model.capped(einsum("ND,NWD->NW", hidden, rows, out_dtype=jnp.float32))


def target_scores(model: Transformer, hidden: Float[Array, "R D"], rows: dict[str, Array]) -> Float[Array, "E"]:
    """float32 scores of the targets of `padded_rows` after the hidden states of its queries; -inf where padded."""
    ids, count = rows["target_ids"], rows["num_targets"]

    def score(query: Int[Array, "e"], ids: Int[Array, "e"]) -> Float[Array, "e"]:
        return token_scores(model, hidden[query], ids[:, None])[:, 0]

    scores = map_rows(score, min(_TARGETS, ids.size), count, rows["target_query"], ids)
    return jnp.where(jnp.arange(ids.size) < count, scores, -jnp.inf)
