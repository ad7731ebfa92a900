"""The programs that sampling and scoring call, lowered for given sizes from shapes alone; nothing is allocated.

How many rows, draws and targets of an array count is data to these programs. Here they all do, and the compiler is told
so, that it may say how often its loops run.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from cft_jax.generate import text_scorer, trie_scorer
from cft_jax.generate.decode import MAX_STEPS, Rows, decode
from cft_jax.generate.prefill import CACHE_AXES, PIECE, empty_cache, prefill_piece, prefill_whole
from cft_jax.generate.split_model import SplitModel
from cft_jax.models.transformer import KVCache
from cft_jax.sharding.rules import sharding


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _bools(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def _abstract_cache(split: SplitModel, *, rows: int, length: int) -> KVCache:
    mesh = split.merge().mesh
    cache = jax.eval_shape(lambda split: empty_cache(split, rows=rows, length=length), split)
    if mesh is None:
        return cache

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x.shape, CACHE_AXES, mesh))

    keys, values = jax.tree.map(placed, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)


def lower_prefill(split: SplitModel, *, rows: int, length: int) -> Lowered:
    """`prefill` of so many prompts in `length` columns; of long prompts one piece."""
    if length <= PIECE:
        return prefill_whole.lower(split, _ints(rows, length), _ints(rows))
    cache = _abstract_cache(split, rows=rows, length=-(-length // PIECE) * PIECE)
    return prefill_piece.lower(split, cache, _ints(rows, PIECE), _ints(rows), _ints())


def lower_decode(
    split: SplitModel, *, prompts: int, length: int, rows: int, columns: int, draws: int, stop_ids: int, method: str
) -> Lowered:
    """One step of `decode`.

    Args:
      split: the model.
      prompts: that are continued at a time, each cached in `length` columns.
      length: see above.
      rows: of all prompts, each with a cache of `columns`.
      columns: see above.
      draws: from the rows' distributions.
      stop_ids: how many there are.
      method: see `SamplingSettings`.
    """

    def step(split, prompt, own, column, rows, draw_row, uniform, stop_ids, temperature, top_p):
        counts = np.int32(rows.tokens.shape[0]), draw_row, uniform, np.int32(draws)
        sampling = {"method": method, "temperature": temperature, "top_p": top_p}
        return decode(split, prompt, own, column, rows, *counts, stop_ids, np.int32(1), **sampling)

    return jax.jit(step, donate_argnums=2).lower(
        split,
        _abstract_cache(split, rows=prompts, length=length),
        _abstract_cache(split, rows=rows, length=columns),
        _ints(),
        Rows(_ints(rows), _ints(rows), _bools(rows), _bools(rows), _ints(rows), _ints(rows)),  # type: ignore[arg-type]
        _ints(draws),
        _floats(draws, MAX_STEPS, 2),
        _ints(stop_ids),
        _floats(),
        _floats(),
    )


def _rows(rows: int, length: int, targets: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of `padded_rows`, without its two counts."""
    own = dict.fromkeys(("tokens", "positions", "subtree_end"), _ints(rows, length))
    return own | {"queries": _ints(rows * length)} | dict.fromkeys(("target_query", "target_ids"), _ints(targets))


def _counts(rows: int, length: int, targets: int) -> dict[str, np.ndarray]:
    return {"num_queries": np.asarray(rows * length, np.int32), "num_targets": np.asarray(targets, np.int32)}


def lower_trie_scores(split: SplitModel, *, prompt_length: int, rows: int, length: int, targets: int) -> Lowered:
    """A call of `TrieScorer`: so many rows of `length` prefixes, each after a prompt of its own."""
    counts = _counts(rows, length, targets)

    def scores(split, context, prompt, arrays):
        return trie_scorer.target_log_probs(split, context, prompt, **arrays, **counts)

    context = _abstract_cache(split, rows=rows, length=prompt_length)
    return jax.jit(scores).lower(split, context, _ints(rows), _rows(rows, length, targets))


def lower_text_scores(split: SplitModel, *, rows: int, length: int, targets: int) -> Lowered:
    """A call of `TextScorer`: so many rows of `length` tokens."""
    counts = _counts(rows, length, targets)

    def scores(split, arrays):
        return text_scorer.target_log_probs(split, **arrays, **counts)

    return jax.jit(scores).lower(split, _rows(rows, length, targets))
