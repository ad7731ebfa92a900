"""Exact log-probabilities of a whole output space, by attention over its trie.

The prompt runs through the model once. The trie's prefixes follow in depth-first order, cut into rows of bounded size;
each row begins with the ancestors of its first prefix, which are the only prefixes outside the row that anything in it
descends from. One forward pass over the rows gives the next-token distribution after every prefix, where the
log-probabilities of the children are read off.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from cft_jax.common.errors import UserError
from cft_jax.generate.prefill import bucket, check_prompts, prefill
from cft_jax.generate.split_model import SplitModel
from cft_jax.generate.trie_rows import ScoreRequest, pack, spread
from cft_jax.generate.vocabulary import log_z, token_scores
from cft_jax.models.transformer import KVCache, Transformer
from cft_jax.sharding.rules import constrain
from cft_jax.text.paths import prefix_log_probs, string_log_probs
from cft_jax.text.trie import Trie

# Tokens per row: longer rows repeat fewer ancestors and spend more on attention, which is quadratic in them.
ROW_LENGTHS = (64, 128, 256, 512)
# A row is at least so many times as long as the longest value, where it may be: its ancestors are repeated.
_LONGER = 8
# Entries whose rows of the head are gathered at a time.
_ENTRIES = 1024


def score_trie(model: Transformer, prompt_ids: Sequence[int], trie: Trie) -> Float64[np.ndarray, "N"]:
    """Log-probabilities of every value of an output space, terminator included, in the order of the space.

    Args:
      model: the language model.
      prompt_ids: token ids of the prompt.
      trie: of the output space.

    Raises:
      UserError: the prompt is empty, or a token is not in the model's vocabulary.
    """
    return TrieScorer(model).score([prompt_ids], [trie])[0].string_log_probs


@dataclass(frozen=True, eq=False)
class TrieScore:
    """What the model says about an output space after a prompt; natural logarithms, NaN where it was not asked.

    Attributes:
      child_log_probs: of every token given the prompt and the prefix it follows, as `trie.child_ids`.
      prefix_log_probs: that a text begins with the prefix.
      string_log_probs: of every value, terminator included.
      other_stop_log_probs: of every value followed by another of the scorer's stop ids than the trie's terminator;
        -inf where there is none.
    """

    child_log_probs: Float64[np.ndarray, "K"]
    prefix_log_probs: Float64[np.ndarray, "M"]
    string_log_probs: Float64[np.ndarray, "N"]
    other_stop_log_probs: Float64[np.ndarray, "N"]


@dataclass(frozen=True)
class _Batch:
    """Prompts prefilled together: their indices, slots of a prompt's cache, tokens of a row, rows of a call."""

    indices: list[int]
    prompt_length: int
    row_length: int
    rows: int


class TrieScorer:
    """Scores tries with one model, whose weights are taken apart once.

    Args:
      model: the language model.
      stop_ids: tokens that end a generation; those that are not a trie's terminator are scored apart.
      tokens_per_call: tokens in one forward pass, for each of the mesh's shards of the batch.
    """

    def __init__(self, model: Transformer, *, stop_ids: Sequence[int] = (), tokens_per_call: int = 2048) -> None:
        self._split = SplitModel.of(model)
        self._vocab_size = model.config.vocab_size
        self._stop_ids = np.unique(np.asarray(stop_ids, np.int32))
        shards = 1 if model.mesh is None else model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        self._tokens_per_call = tokens_per_call * shards

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        tries: Sequence[Trie],
        *,
        prefixes: Sequence[Int[np.ndarray, "_"]] | None = None,
    ) -> list[TrieScore]:
        """Scores each trie after its prompt.

        Args:
          prompts: token ids.
          tries: one per prompt.
          prefixes: for each trie the prefixes to ask the model about, together with their ancestors; by default all.

        Raises:
          UserError: a prompt is empty, or a token is not in the model's vocabulary.
        """
        check_prompts(prompts, self._vocab_size)
        parts = [None] * len(tries) if prefixes is None else prefixes
        questions = [ScoreRequest.of(trie, self._stop_ids, part) for trie, part in zip(tries, parts, strict=True)]
        for item in questions:
            if item.entry_ids.max() >= self._vocab_size:
                raise UserError(
                    f"the output space or the stop ids hold token {item.entry_ids.max()}, and the model's vocabulary "
                    f"ends at {self._vocab_size - 1}; give the tokenizer that belongs to the model"
                )
        answers = [np.full(item.entry_ids.size, np.nan) for item in questions]
        for batch in self._batches([len(prompt) for prompt in prompts], questions):
            self._answer(batch, prompts, questions, answers)
        return [_result(*of_trie) for of_trie in zip(tries, questions, answers, strict=True)]

    def _batches(self, prompt_lengths: Sequence[int], questions: Sequence[ScoreRequest]) -> Iterator[_Batch]:
        """Prompts that share shapes, as many as one call has rows."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, (length, item) in enumerate(zip(prompt_lengths, questions, strict=True)):
            shapes.setdefault((bucket(length - 1, least=32), _row_length(item)), []).append(index)
        for (prompt_length, row_length), indices in shapes.items():
            rows = max(self._tokens_per_call // row_length, 1)
            for start in range(0, len(indices), rows):
                yield _Batch(indices[start : start + rows], prompt_length, row_length, rows)

    def _answer(
        self,
        batch: _Batch,
        prompts: Sequence[Sequence[int]],
        questions: Sequence[ScoreRequest],
        answers: list[Float64[np.ndarray, "_"]],
    ) -> None:
        chosen = [prompts[index] for index in batch.indices]
        chunks = [
            (place, chunk)
            for place, index in enumerate(batch.indices)
            for chunk in questions[index].chunks(batch.row_length)
        ]
        caches = batch.rows if len(chosen) > 1 else 1
        context = prefill(self._split, chosen, rows=caches, length=batch.prompt_length)
        rows = batch.rows if len(chunks) > 1 else 1
        calls = [chunks[start : start + rows] for start in range(0, len(chunks), rows)]
        # All calls are sent before the first answer is read.
        found = [
            _entry_log_probs(self._split, context, **pack(call, chosen, rows=rows, length=batch.row_length))
            for call in calls
        ]
        for call, log_probs in zip(calls, found, strict=True):
            ends = np.cumsum([chunk.entry_ids.size for _, chunk in call])
            for (place, chunk), part in zip(call, np.split(np.asarray(log_probs), ends)[:-1], strict=True):
                answers[batch.indices[place]][chunk.entries] = part


def _row_length(questions: ScoreRequest) -> int:
    """The shortest that holds all prefixes, or is long beside their ancestors."""
    enough = min(questions.tokens.size, _LONGER * (int(questions.depth.max()) + 1))
    return next((length for length in ROW_LENGTHS if length >= enough), ROW_LENGTHS[-1])


def _result(trie: Trie, questions: ScoreRequest, log_probs: Float64[np.ndarray, "E"]) -> TrieScore:
    children, stops = spread(trie, questions, log_probs)
    prefixes = prefix_log_probs(trie, children)
    return TrieScore(children, prefixes, string_log_probs(trie, children), prefixes[trie.leaf_prefix] + stops)


@jax.jit
def _entry_log_probs(
    split: SplitModel,
    context: KVCache,
    *,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    subtree_end: Int[Array, "B T"],
    prompt: Int[Array, "B"],
    queries: Int[Array, "Q"],
    num_queries: Int[Array, ""],
    entry_query: Int[Array, "E"],
    entry_ids: Int[Array, "E"],
    num_entries: Int[Array, ""],
) -> Float[Array, "E"]:
    """Log-probability of every entry; arguments as `pack` makes them."""
    model = split.merge()
    keys, values = jax.tree.map(lambda x: x[:, prompt], (context.keys, context.values))
    own = KVCache(keys, values, context.positions[prompt], context.visible[prompt])
    hidden, _ = model.hidden(tokens, positions, subtree_end, context=(own,))
    asked = constrain(hidden.reshape(-1, hidden.shape[-1])[queries], ("batch", "act_embed"), model.mesh)

    def add_scores(i: Int[Array, ""], scores: Float[Array, "E"]) -> Float[Array, "E"]:
        query, ids = (jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in (entry_query, entry_ids))
        new = token_scores(model, asked[query], ids[:, None])[:, 0]
        return jax.lax.dynamic_update_slice_in_dim(scores, new, i * size, axis=0)

    size = min(_ENTRIES, entry_ids.size)
    nothing = jnp.full(entry_ids.shape, -jnp.inf)
    scores = jax.lax.fori_loop(0, (num_entries + size - 1) // size, add_scores, nothing)
    largest = jax.ops.segment_max(scores, entry_query, num_segments=queries.size)
    log_zs = log_z(model, asked, num_queries, largest)
    return constrain(scores - log_zs[entry_query], (None,), model.mesh)
