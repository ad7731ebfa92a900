"""Drawing tokens: one number per draw, float32, the same whatever else is in the batch.

A draw inverts the distribution's CDF in two levels: the upper half of a 64-bit random number picks a tile of the
vocabulary by the tiles' sums of exp, the lower half a token of the tile. Only the sums of all tiles and the scores of
the chosen tile are needed, and no probability is rounded to the spacing of float32 numbers near 1.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from cft_jax.common.errors import UserError
from cft_jax.generate.vocabulary import TILE, Tiling, map_rows, tile_log_sum_exps, token_scores
from cft_jax.models.transformer import Transformer

# Rows whose scores over the whole vocabulary exist at a time, where a draw needs them.
_SCORE_ROWS = 16
# Numbers gathered from the head at a time.
_GATHERED = 1 << 23
# Halvings of an interval of some tens of nats until its ends are neighbouring float32 numbers.
_HALVINGS = 32


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn from the model's logits.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (of equal ones the first).
      top_p: draws from the fewest most probable tokens that have at least this probability together, after the
        temperature; equally probable tokens are kept together. 1 draws from all.
    """

    temperature: float | int
    top_p: float | int

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a number from 0 (greedy) up")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]")

    @property
    def method(self) -> str:
        """What the compiled program depends on: "greedy", "top_p" or "all"."""
        if self.temperature == 0:
            return "greedy"
        return "top_p" if self.top_p < 1 else "all"


class Draws(NamedTuple):
    """Which tokens to draw; the first so many count.

    Attributes:
      row: the row of hidden states that a draw follows.
      uniform: a draw's numbers, for the tile and for the token (`uniforms`).
    """

    row: Int[Array, "N"]
    uniform: Float[Array, "N 2"]


def request_key(seed: int, prompt: Sequence[int], occurrence: int) -> UInt32[np.ndarray, "2"]:
    """Threefry key of a request's draws.

    It depends on the request alone, so that neither the order nor the number of requests changes a draw. Requests of
    one call that are equal are told apart by how many equal ones stand before.
    """
    content = f"sample {seed} {occurrence}:".encode() + np.asarray(prompt, np.int64).tobytes()
    return np.frombuffer(hashlib.sha256(content).digest()[:8], np.uint32)


@partial(jax.jit, static_argnames="steps")
def uniforms(
    key: UInt32[Array, "N 2"], sample: Int[Array, "N"], step: Int[Array, "N"], *, steps: int
) -> Float[Array, "N X 2"]:
    """Two numbers in [0, 1) for each draw of a token: the halves of 64 random bits, 24 bits of each.

    A draw is for one token (`step`, and so many from there on) of one sample of the request that `key` belongs to
    (`request_key`).
    """

    def bits(key: Array, sample: Array, step: Array) -> Array:
        of_sample = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), sample)
        return jax.random.bits(jax.random.fold_in(of_sample, step), (2,), jnp.uint32)

    each = jax.vmap(jax.vmap(bits, (None, None, 0)))(key, sample, step[:, None] + jnp.arange(steps))
    return (each >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def draw_tokens(
    model: Transformer,
    hidden: Float[Array, "R D"],
    num_rows: Int[Array, ""],
    draws: Draws,
    num_draws: Int[Array, ""],
    *,
    method: str,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, "N"]:
    """One token per draw, by `SamplingSettings`, whose `method` is static; zero beyond `num_draws`.

    Draws refer to the first `num_rows` rows of `hidden`, states after the final norm.
    """
    if method == "greedy":
        return _most_probable(model, hidden, num_rows)[draws.row]
    floor = _nucleus_floors(model, hidden, num_rows, temperature, top_p) if method == "top_p" else None
    inverse = 1 / temperature
    log_sum_exps = tile_log_sum_exps(model, hidden, num_rows, inverse, floor)
    sum_exps = jnp.exp(log_sum_exps - jnp.max(log_sum_exps, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(sum_exps, axis=-1)
    tiling = Tiling.of(model)

    def draw(row: Int[Array, "n"], uniform: Float[Array, "n 2"]) -> Int[Array, "n"]:
        ids, exists = tiling.tokens(_invert(cumulative[row], uniform[:, 0]))
        scores = token_scores(model, hidden[row], ids)
        if floor is not None:
            exists = exists & (scores >= floor[row][:, None])
        scores = jnp.where(exists, scores, -jnp.inf) * inverse
        # Scores made again may differ in the last digits: a tile whose only token was at the floor may seem empty.
        max_logit = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        within = _invert(jnp.cumsum(jnp.exp(scores - max_logit), axis=-1), uniform[:, 1])
        return jnp.take_along_axis(ids, within[:, None], axis=1)[:, 0]

    at_a_time = min(max(_GATHERED // (TILE * hidden.shape[1]), 1), draws.row.shape[0])
    return map_rows(draw, at_a_time, num_draws, *draws)


def _invert(cumulative: Float[Array, "n S"], uniform: Float[Array, "n"]) -> Int[Array, "n"]:
    """The first index whose cumulative sum exceeds `uniform` times the total; never one that adds nothing."""
    total = cumulative[:, -1:]
    index = jnp.sum(cumulative <= uniform[:, None] * total, axis=-1)
    # Rounding may lift uniform * total to the total.
    last = jnp.sum(cumulative < total, axis=-1)
    return jnp.minimum(index, last)


def _most_probable(model: Transformer, hidden: Float[Array, "R D"], num_rows: Int[Array, ""]) -> Int[Array, "R"]:
    def best(some: Array) -> Array:
        return jnp.argmax(model.logits(some), axis=-1).astype(jnp.int32)

    return map_rows(best, min(_SCORE_ROWS, hidden.shape[0]), num_rows, hidden)


def _nucleus_floors(
    model: Transformer,
    hidden: Float[Array, "R D"],
    num_rows: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Float[Array, "R"]:
    """A score between the lowest that top-p keeps and the highest that it drops; far below where it drops none.

    Between, because scores made again differ in the last digits from those that the choice was made with.
    """

    def floor(some: Array) -> Array:
        scores = model.logits(some)
        max_logit = jnp.max(scores, axis=-1)
        probs = jnp.exp((scores - max_logit[:, None]) / temperature)
        enough = top_p * jnp.sum(probs, axis=-1)
        # All tokens below this have less than (1 - top_p) / e of the mass together.
        range_ = temperature * (1 + jnp.log(scores.shape[-1] / jnp.maximum(1 - top_p, 1e-7)))

        def halve(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            keeps = jnp.sum(jnp.where(scores >= middle[:, None], probs, 0), axis=-1) >= enough
            return jnp.where(keeps, middle, low), jnp.where(keeps, high, middle)

        low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (max_logit - range_, max_logit + temperature))
        kept = scores >= low[:, None]
        lowest = jnp.min(jnp.where(kept, scores, jnp.inf), axis=-1)
        dropped = jnp.max(jnp.where(kept, -jnp.inf, scores), axis=-1)
        return (lowest + jnp.maximum(dropped, lowest - 1)) / 2

    return map_rows(floor, min(_SCORE_ROWS, hidden.shape[0]), num_rows, hidden)
