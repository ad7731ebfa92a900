"""Keys and values of prompts, computed once and shared by all that continues them.

A prompt's last token is left out: it is the first token of what continues (the empty prefix of a trie, the first row of
a decode), so that prefixes of every length, the empty one included, are treated alike.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cft_jax.common.errors import UserError
from cft_jax.generate.split_model import SplitModel
from cft_jax.models.transformer import KVCache, Transformer
from cft_jax.sharding.rules import constrain

# Longer prompts are prefilled in pieces, so that the attention's scores stay bounded.
PIECE = 1024
# Logical axes of keys and values.
CACHE_AXES = ("layers", "batch", "length", "kv_heads", "head_dim")


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses what cannot be continued.

    Raises:
      UserError: a prompt is empty, or holds a token that the model does not have.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {index} is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise UserError(f"prompt {index} holds token {wrong}; the model's vocabulary has 0 to {vocab_size - 1}")


def prefill(split: SplitModel, prompts: Sequence[Sequence[int]], *, rows: int, length: int) -> KVCache:
    """The cache of all tokens but the last of each prompt.

    There are at most `rows` prompts; rows without a prompt see nothing. `length`, the columns per row, is at least that
    of the longest prompt less one.
    """
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        lengths[row] = len(prompt) - 1
        tokens[row, : lengths[row]] = prompt[:-1]
    if length <= PIECE:
        return prefill_whole(split, tokens, lengths)
    tokens = np.pad(tokens, ((0, 0), (0, -length % PIECE)))
    cache = empty_cache(split, rows=rows, length=tokens.shape[1])
    for start in range(0, int(lengths.max()), PIECE):
        cache = prefill_piece(split, cache, tokens[:, start : start + PIECE], lengths, np.int32(start))
    return cache


@jax.jit
def prefill_whole(split: SplitModel, tokens: Int[Array, "P S"], lengths: Int[Array, "P"]) -> KVCache:
    """The cache of prompts of at most `PIECE` tokens."""
    model = split.merge()
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    subtree_end = jnp.where(positions < lengths[:, None], lengths[:, None], 0)
    return constrain_cache(model.hidden(tokens, positions, subtree_end)[1], model)


@partial(jax.jit, static_argnames=("rows", "length"))
def empty_cache(split: SplitModel, *, rows: int, length: int) -> KVCache:
    """A cache of which nothing can be seen."""
    model = split.merge()
    K, H = model.config.num_kv_heads, model.config.head_dim

    def arrays() -> tuple[tuple[Array, ...], ...]:
        return tuple(
            tuple(jnp.zeros((repeats, rows, length, K, H), model.dtype) for _ in pattern)
            for repeats, pattern in model.config.stacks
        )

    positions = jnp.zeros((rows, length), jnp.int32)
    return constrain_cache(KVCache(arrays(), arrays(), positions, jnp.zeros((rows, 1, length), bool)), model)


@partial(jax.jit, donate_argnames="cache")
def prefill_piece(
    split: SplitModel, cache: KVCache, tokens: Int[Array, "P T"], lengths: Int[Array, "P"], start: Int[Array, ""]
) -> KVCache:
    """`cache` with `PIECE` more tokens of its prompts, from column `start` on."""
    model = split.merge()
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    subtree_end = jnp.where(positions < lengths[:, None], tokens.shape[1], 0)
    _, new = model.hidden(tokens, positions, subtree_end, context=(cache,))
    return constrain_cache(write_columns(cache, new, start), model)


def write_columns(cache: KVCache, new: KVCache, column: Int[Array, ""]) -> KVCache:
    """`cache` with the tokens of `new` in the columns from `column` on, in place where the buffer is donated."""

    def write(old: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, part, column, axis=column_axis(old))

    return jax.tree.map(write, cache, new)


def asked_states(model: Transformer, rows: dict[str, Array], context: tuple[KVCache, ...] = ()) -> Float[Array, "Q D"]:
    """Hidden states at the queries of rows that `padded_rows` has made."""
    hidden, _ = model.hidden(rows["tokens"], rows["positions"], rows["subtree_end"], context=context)
    return constrain(hidden.reshape(-1, hidden.shape[-1])[rows["queries"]], ("batch", "act_embed"), model.mesh)


def row_axis(x: Array) -> int:
    """The axis of a cache's rows; keys and values have one of layers before it."""
    return 1 if x.ndim == 5 else 0


def column_axis(x: Array) -> int:
    """The axis of a cache's tokens."""
    return 1 if x.ndim == 2 else 2


def constrain_cache(cache: KVCache, model: Transformer) -> KVCache:
    """`cache` cut along rows and heads as the mesh wants it."""
    keys, values = jax.tree.map(lambda x: constrain(x, CACHE_AXES, model.mesh), (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)


def cache_bytes_per_token(model: Transformer) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
