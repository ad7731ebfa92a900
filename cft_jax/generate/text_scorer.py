"""Log-likelihoods of given texts: continuations of contexts, and whole rows of tokens.

Texts are packed one behind the other into rows of few lengths. Texts with a common beginning (the answers to a
question, the questions behind the same examples) stand as a tree in depth-first order: each token sees those above it,
at the positions it would have alone, so what is shared is computed once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from cft_jax.generate.prefill import bucket, check_prompts
from cft_jax.generate.split_model import SplitModel
from cft_jax.generate.vocabulary import ROWS, Tiling, log_sum_exp, map_rows, of_tiles, token_scores
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.rules import constrain

# Texts of at most so many tokens share rows with others; longer ones get rows of the next power of two.
ROW_LENGTH = 2048
_LEAST_ROW = 64
# Texts that share fewer tokens, and less than half of themselves, are packed wherever there is room.
_LEAST_SHARED = 32


@dataclass(frozen=True)
class Likelihood:
    """What a model says about a continuation.

    Attributes:
      log_prob: natural logarithm of its probability, the sum over its tokens.
      greedy: whether every token is the most probable one where it stands.
    """

    log_prob: float
    greedy: bool


@dataclass(frozen=True, eq=False)
class TextTree:
    """A text with branches in the form of `Transformer.hidden`, and the tokens asked about.

    Attributes:
      tokens, positions: of the block's tokens.
      subtree_end: where in the block a token's visibility ends.
      places: the token whose hidden state predicts the one asked about.
      targets: the tokens asked about.
    """

    tokens: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    subtree_end: Int[np.ndarray, "T"]
    places: Int[np.ndarray, "Q"]
    targets: Int[np.ndarray, "Q"]

    @classmethod
    def of_text(cls, tokens: Sequence[int]) -> "TextTree":
        """Asks about every token but the first."""
        size = max(len(tokens) - 1, 0)
        given, index = np.asarray(tokens, np.int32), np.arange(size)
        return cls(given[:size], index, np.full(size, size), index, given[1:])

    @classmethod
    def of_tree(cls, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> "TextTree":
        """Asks about the tokens of every row from its start on, one row after the other.

        Args:
          rows: token ids, in lexicographic order, which is the depth-first order of their tree.
          starts: first token asked about, at least 1.
        """
        tokens: list[int] = []
        positions: list[int] = []
        subtree_end: list[int] = []
        # Places of the current row's tokens in the block.
        path: list[int] = []
        places, previous = [], ()
        for row, start in zip(rows, starts, strict=True):
            shared = _common(previous, row)
            for node in path[shared:]:
                subtree_end[node] = len(tokens)
            # The last token predicts nothing that is asked.
            added = range(shared, len(row) - 1)
            path = [*path[:shared], *range(len(tokens), len(tokens) + len(added))]
            tokens += [row[depth] for depth in added]
            positions += added
            subtree_end += [0] * len(added)
            places.append(np.array(path[start - 1 :]))
            previous = row[:-1]
        for node in path:
            subtree_end[node] = len(tokens)
        return cls(
            np.array(tokens),
            np.array(positions),
            np.array(subtree_end),
            np.concatenate(places),
            np.concatenate([np.asarray(row[start:]) for row, start in zip(rows, starts, strict=True)]),
        )


class TextScorer:
    """Scores texts with one model, whose weights are taken apart once.

    Args:
      model: the language model, with or without adapters, on one device or on a mesh.
      tokens_per_call: tokens in one forward pass, for each of the mesh's shards of the batch.
    """

    def __init__(self, model: Transformer, *, tokens_per_call: int = 4096) -> None:
        self._split = SplitModel.of(model)
        self._vocab_size = model.config.vocab_size
        self._shards = 1 if model.mesh is None else model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        self._tokens_per_call = tokens_per_call

    def log_likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Log-likelihoods of continuations; what several texts begin with is computed once.

        Args:
          requests: token ids of a context and of its continuation. An empty continuation has probability 1.

        Raises:
          UserError: a context is empty, or a token is not in the model's vocabulary.
        """
        check_prompts(
            [[*context, *continuation] if context else [] for context, continuation in requests], self._vocab_size
        )
        texts = [(*context, *continuation) for context, continuation in requests]
        groups = list(_groups([text if requests[i][1] else () for i, text in enumerate(texts)]))
        starts = [len(context) for context, _ in requests]
        blocks = [TextTree.of_tree([texts[i] for i in group], [starts[i] for i in group]) for group in groups]
        found = [Likelihood(0.0, True)] * len(requests)
        for indices, (log_probs, best) in zip(groups, self._answers(blocks), strict=True):
            ends = np.cumsum([len(requests[i][1]) for i in indices])
            for i, end in zip(indices, ends, strict=True):
                own = slice(end - len(requests[i][1]), end)
                found[i] = Likelihood(float(log_probs[own].sum(dtype=np.float64)), bool(best[own].all()))
        return found

    def token_log_probs(self, rows: Sequence[Sequence[int]]) -> list[Float32[np.ndarray, "_"]]:
        """Log-probabilities of every token of a text but the first, given those before it: float32[T - 1] per row.

        Raises:
          UserError: a row is empty, or a token is not in the model's vocabulary.
        """
        check_prompts(rows, self._vocab_size)
        return [log_probs for log_probs, _ in self._answers([TextTree.of_text(row) for row in rows])]

    def _answers(self, blocks: Sequence[TextTree]) -> list[tuple[Float32[np.ndarray, "_"], Bool[np.ndarray, "_"]]]:
        """For each block the log-probabilities of what it asks about, and whether these are the most probable."""
        found = [(np.zeros(0, np.float32), np.zeros(0, bool)) for _ in blocks]
        sent = []
        for length, rows in _rows(blocks):
            most = max(self._tokens_per_call // length, 1) * self._shards
            count = min(bucket(len(rows), least=self._shards, factor=4), most)
            for start in range(0, len(rows), count):
                part = rows[start : start + count]
                arrays = _pack([[blocks[i] for i in row] for row in part], rows=count, length=length)
                # All calls are sent before the first answer is read.
                sent.append(([i for row in part for i in row], _log_probs(self._split, **arrays)))
        for indices, (log_probs, best) in sent:
            ends = np.cumsum([blocks[i].targets.size for i in indices])
            parts = zip(*(np.split(np.asarray(x), ends)[:-1] for x in (log_probs, best)), strict=True)
            for i, (values, greedy) in zip(indices, parts, strict=True):
                found[i] = (values, greedy)
        return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Texts with a common beginning, in lexicographic order, as many as go into one row; empty ones left out."""
    group: list[int] = []
    size = 0
    for i in sorted((i for i, text in enumerate(texts) if text), key=lambda i: tuple(texts[i])):
        fed = len(texts[i]) - 1
        shared = _common(texts[group[-1]][:-1], texts[i]) if group else 0
        alike = shared >= _LEAST_SHARED or 2 * shared >= fed
        if group and (not alike or size + fed - shared > ROW_LENGTH):
            yield group
            group, size, shared = [], 0, 0
        group.append(i)
        size += fed - shared
    if group:
        yield group


def _rows(blocks: Sequence[TextTree]) -> Iterator[tuple[int, list[list[int]]]]:
    """Row lengths, each with the blocks that stand in every row: longest first, into the first row with room."""
    sizes = [block.tokens.size for block in blocks]
    order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i])
    shared = bucket(max((sizes[i] for i in order if sizes[i] <= ROW_LENGTH), default=0), least=_LEAST_ROW)
    lengths: dict[int, list[list[int]]] = {}
    room: dict[int, list[int]] = {}
    for i in order:
        length = max(bucket(sizes[i], least=_LEAST_ROW), shared)
        rows, left = lengths.setdefault(length, []), room.setdefault(length, [])
        place = next((row for row, space in enumerate(left) if space >= sizes[i]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            left.append(length)
        rows[place].append(i)
        left[place] -= sizes[i]
    yield from lengths.items()


def _pack(packed: Sequence[Sequence[TextTree]], *, rows: int, length: int) -> dict[str, Any]:
    """The arrays of one forward pass.

    Args:
      packed: the blocks of each row, together at most `length` tokens.
      rows: of the arrays.
      length: of a row.

    Returns:
      tokens, positions, subtree_end: int32[rows, length].
      places, targets: int32[Q], of all questions in the blocks' order, places in the flattened rows; the first `count`
        of them count.
    """
    tokens, positions, subtree_end = (np.zeros((rows, length), np.int32) for _ in range(3))
    places, targets = [], []
    for row, blocks in enumerate(packed):
        start = 0
        for block in blocks:
            own = slice(start, start + block.tokens.size)
            tokens[row, own], positions[row, own], subtree_end[row, own] = (
                block.tokens,
                block.positions,
                start + block.subtree_end,
            )
            places.append(row * length + start + block.places)
            targets.append(block.targets)
            start = own.stop
    asked = np.concatenate(places).astype(np.int32)
    # Rows have fewer questions than tokens unless many continuations begin behind one context.
    padding = (0, bucket(asked.size, least=rows * length) - asked.size)
    return {
        "tokens": tokens,
        "positions": positions,
        "subtree_end": subtree_end,
        "places": np.pad(asked, padding),
        "targets": np.pad(np.concatenate(targets).astype(np.int32), padding),
        "count": np.int32(asked.size),
    }


@jax.jit
def _log_probs(
    split: SplitModel,
    *,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    subtree_end: Int[Array, "B T"],
    places: Int[Array, "Q"],
    targets: Int[Array, "Q"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "Q"], Bool[Array, "Q"]]:
    """Log-probability of every target, and whether no token has a higher score; arguments as `_pack` makes them."""
    model = split.merge()
    hidden, _ = model.hidden(tokens, positions, subtree_end)
    asked = constrain(hidden.reshape(-1, hidden.shape[-1])[places], ("batch", "act_embed"), model.mesh)

    def of_tile(scores: Float[Array, "r S U W"]) -> tuple[Array, Array, Array]:
        return log_sum_exp(scores), jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1)

    log_sum_exps, max_logits, first = of_tiles(model, asked, count, of_tile)
    tile = jnp.argmax(max_logits, axis=-1)
    ids, _ = Tiling.of(model).tokens(tile)
    best = jnp.take_along_axis(ids, jnp.take_along_axis(first, tile[:, None], axis=1), axis=1)[:, 0]
    scores = map_rows(
        lambda h, t: token_scores(model, h, t[:, None])[:, 0], min(ROWS, targets.size), count, asked, targets
    )
    found = scores - jax.nn.logsumexp(log_sum_exps, axis=-1)
    return constrain(found, (None,), model.mesh), constrain(best == targets, (None,), model.mesh)
