"""The decode's programs: one jitted step, and the moves of the rows' caches between steps.

A row is a branch: tokens drawn so far, by one sample or by many. Its cache holds the keys and values of its own tokens;
those of the prompt lie in a cache that all rows of the prompt share. All rows write at the same column of their caches,
step after step, round and round; which columns a row may see is part of the cache.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cft_jax.generate.prefill import column_axis, constrain_cache, row_axis, write_columns
from cft_jax.generate.sampling import Draws, draw_tokens
from cft_jax.generate.split_model import SplitModel
from cft_jax.models.transformer import KVCache
from cft_jax.sharding.rules import constrain

# Steps of one call where every row has a single sample, so that nothing branches.
MAX_STEPS = 8


class Rows(NamedTuple):
    """What the rows do in the next step.

    Attributes:
      tokens, positions: to be fed.
      alive: rows in use.
      fresh: rows that begin, and must not see what others left in their cache.
      draw: the draw that continues the row; of interest where a call takes several steps.
      asked: rows whose next token is drawn, before all others.
    """

    tokens: Int[Array, "B"]
    positions: Int[Array, "B"]
    alive: Bool[Array, "B"]
    fresh: Bool[Array, "B"]
    draw: Int[Array, "B"]
    asked: Int[Array, "B"]


@partial(jax.jit, static_argnames="method", donate_argnames="own")
def decode(
    split: SplitModel,
    prompt: KVCache,
    own: KVCache,
    column: Int[Array, ""],
    rows: Rows,
    num_asked: Int[Array, ""],
    draw_row: Int[Array, "N"],
    uniform: Float[Array, "N X 2"],
    num_draws: Int[Array, ""],
    stop_ids: Int[Array, "O"],
    steps: Int[Array, ""],
    *,
    method: str,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> tuple[KVCache, Int[Array, "N X"], Int[Array, ""]]:
    """Feeds every row its token and draws the next ones; repeats that with the drawn tokens where asked to.

    Row p of the prompts' cache serves the rows p*B/P ... (p+1)*B/P - 1, which write at `column` of their own. Each draw
    follows the row `draw_row`, counted within `rows.asked`, and has numbers (`uniform`) for every step; of the rows
    asked and the draws so many count. There are at most `MAX_STEPS` steps, and more than 1 only where every row has
    exactly one draw; the call ends early when an eighth of the draws have drawn a stop id. The rest is as in
    `draw_tokens`.

    Returns:
      The rows' caches, the tokens of every draw, and the number of steps taken.
    """
    model = split.merge()
    own = own._replace(visible=own.visible & ~rows.fresh[:, None, None])
    counts = jnp.arange(draw_row.shape[0]) < num_draws
    out = jnp.zeros(uniform.shape[:2], jnp.int32)

    def unfinished(carry) -> Bool[Array, ""]:
        step, done = carry[0], carry[-1]
        return (step == 0) | ((step < steps) & (8 * jnp.sum(done & counts) < num_draws))

    def one_step(carry):
        step, own, tokens, positions, alive, out, done = carry
        hidden, new = model.hidden(
            tokens[:, None], positions[:, None], alive[:, None].astype(jnp.int32), context=(prompt, own)
        )
        own = write_columns(own, new, (column + step) % own.positions.shape[1])
        asked = constrain(hidden[rows.asked, 0], ("batch", "act_embed"), model.mesh)
        drawn = draw_tokens(
            model, asked, num_asked, Draws(draw_row, jnp.take(uniform, step, axis=1)), num_draws,
            method=method, temperature=temperature, top_p=top_p,
        )  # fmt: skip
        drawn = constrain(drawn, (None,), model.mesh)
        done = done | jnp.isin(drawn, stop_ids)
        out = jax.lax.dynamic_update_slice_in_dim(out, drawn[:, None], step, axis=1)
        return step + 1, own, drawn[rows.draw], positions + 1, alive & ~done[rows.draw], out, done

    start = (jnp.int32(0), own, rows.tokens, rows.positions, rows.alive, out, jnp.zeros(counts.shape, bool))
    taken, own, *_, out, _ = jax.lax.while_loop(unfinished, one_step, start)
    return constrain_cache(own, model), out, taken


@partial(jax.jit, static_argnames="length")
def move_rows(
    split: SplitModel, own: KVCache, source: Int[Array, "C"], oldest: Int[Array, ""], *, length: int
) -> KVCache:
    """Caches of other rows, or of other lengths.

    `source` is the row that each new row continues, -1 for those that begin. The column `oldest` comes first and the
    others follow it round, so that the oldest tokens come first. `length` is not less than before.
    """
    held = own.positions.shape[1]
    columns = (oldest + jnp.arange(held)) % held

    def moved(x: Array) -> Array:
        x = jnp.take(x, jnp.maximum(source, 0), axis=row_axis(x))
        if length == held:
            return x
        axis = column_axis(x)
        widths = [(0, length - held) if dim == axis else (0, 0) for dim in range(x.ndim)]
        return jnp.pad(jnp.take(x, columns, axis=axis), widths)

    new = jax.tree.map(moved, own)
    return constrain_cache(new._replace(visible=new.visible & (source >= 0)[:, None, None]), split.merge())


@partial(jax.jit, donate_argnames="prompt")
def replace_prompts(split: SplitModel, prompt: KVCache, new: KVCache, indices: Int[Array, "Q"]) -> KVCache:
    """The cache of the prompts with some of them replaced; an index out of range replaces none."""

    def put(old: Array, part: Array) -> Array:
        where = (slice(None),) * row_axis(old) + (indices,)
        return old.at[where].set(part, mode="drop")

    return constrain_cache(jax.tree.map(put, prompt, new), split.merge())
