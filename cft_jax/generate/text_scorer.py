"""Log-likelihoods of given texts (continuations of contexts, whole rows of tokens), and whole next-token distributions.

Texts are packed one behind the other into rows of few lengths. Texts with a common prefix (the answers to a
question, the questions behind the same examples) stand as a tree in depth-first order: each token sees those above it,
at the positions it would have alone, so what is shared is computed once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from cft_jax.generate.prefill import asked_states, check_prompts
from cft_jax.generate.split_model import SplitModel
from cft_jax.generate.vocabulary import Tiling, log_sum_exp, of_tiles, target_scores
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.rules import constrain, num_shards
from cft_jax.text.tree_rows import TokenTree, bucket, first_fit, padded_rows

# Texts of at most so many tokens share rows with others; longer ones get rows of the next power of two.
ROW_LENGTH = 2048
_LEAST_ROW = 64
# Tokens of one call for each of the mesh's shards of the batch, by default.
TOKENS_PER_CALL = 4096
# Texts that share fewer tokens, and less than half of themselves, are packed wherever there is room.
_LEAST_SHARED = 32
# Prompts in one forward pass for whole next-token distributions, for each of the mesh's shards of the batch.
_PROMPTS = 16


@dataclass(frozen=True)
class Likelihood:
    """What a model says about a continuation.

    Attributes:
      log_prob: natural logarithm of its probability, the sum over its tokens.
      greedy: whether every token is the most probable one where it stands.
    """

    log_prob: float
    greedy: bool


class TextScorer:
    """Scores texts with one model, whose weights are taken apart once.

    `tokens_per_call` are in one forward pass, for each of the mesh's shards of the batch.
    """

    def __init__(self, model: Transformer, *, tokens_per_call: int = TOKENS_PER_CALL) -> None:
        self._split = SplitModel.of(model)
        self._vocab_size = model.config.vocab_size
        self._shards = num_shards("batch", model.mesh)
        self._tokens_per_call = tokens_per_call

    def log_likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Log-likelihoods of continuations of contexts, both token ids; what several texts begin with is computed once.

        An empty continuation has probability 1.

        Raises:
          UserError: a context is empty, or a token is not in the model's vocabulary.
        """
        texts = [(*context, *continuation) for context, continuation in requests]
        check_prompts([text if requests[i][0] else () for i, text in enumerate(texts)], self._vocab_size)
        groups = list(_groups([text if requests[i][1] else () for i, text in enumerate(texts)]))
        trees = [_text_tree([texts[i] for i in group], [len(requests[i][0]) for i in group]) for group in groups]
        found = [Likelihood(0.0, True)] * len(requests)
        for indices, (log_probs, best) in zip(groups, self._scores(trees), strict=True):
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
        return [log_probs for log_probs, _ in self._scores([_text_tree([row], [1]) for row in rows])]

    def next_token_log_probs(self, prompts: Sequence[Sequence[int]]) -> Float32[np.ndarray, "P V"]:
        """Log-probabilities of every token after each prompt, at temperature 1, computed in float32.

        Raises:
          UserError: a prompt is empty, or a token is not in the model's vocabulary.
        """
        check_prompts(prompts, self._vocab_size)
        found = np.zeros((len(prompts), self._vocab_size), np.float32)
        lengths: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            lengths.setdefault(bucket(len(prompt), least=32), []).append(index)
        rows = _PROMPTS * self._shards
        for length, indices in lengths.items():
            for start in range(0, len(indices), rows):
                chosen = indices[start : start + rows]
                tokens, sizes = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
                for row, index in enumerate(chosen):
                    sizes[row] = len(prompts[index])
                    tokens[row, : sizes[row]] = prompts[index]
                found[chosen] = np.asarray(_next_token_log_probs(self._split, tokens, sizes))[: len(chosen)]
        return found

    def _scores(self, trees: Sequence[TokenTree]) -> list[tuple[Float32[np.ndarray, "_"], Bool[np.ndarray, "_"]]]:
        """For each tree the log-probabilities of its targets, and whether these are the most probable tokens."""
        found = [(np.zeros(0, np.float32), np.zeros(0, bool)) for _ in trees]
        sent = []
        for length, rows in _rows([tree.tokens.size for tree in trees]):
            most = max(self._tokens_per_call // length, 1) * self._shards
            count = min(bucket(len(rows), least=self._shards, factor=4), most)
            for start in range(0, len(rows), count):
                part = rows[start : start + count]
                arrays = padded_rows([[trees[i] for i in row] for row in part], num_rows=count, length=length)
                # All calls are sent before the first result is read.
                sent.append(([i for row in part for i in row], target_log_probs(self._split, **arrays)))
        for indices, (log_probs, best) in sent:
            ends = np.cumsum([trees[i].target_ids.size for i in indices])
            parts = zip(*(np.split(np.asarray(x), ends)[:-1] for x in (log_probs, best)), strict=True)
            for i, part in zip(indices, parts, strict=True):
                found[i] = part
        return found


def _text_tree(texts: Sequence[Sequence[int]], starts: Sequence[int]) -> TokenTree:
    """The tree of texts in lexicographic order; its targets are each text's tokens from its start (at least 1) on."""
    tokens, positions, subtree_end = [], [], []
    # Index in the tree of each of the current text's tokens.
    path: list[int] = []
    indices, previous = [], ()
    for text, start in zip(texts, starts, strict=True):
        shared = _common(previous, text)
        for node in path[shared:]:
            subtree_end[node] = len(tokens)
        # The last token predicts nothing that is asked.
        added = range(shared, len(text) - 1)
        path = [*path[:shared], *range(len(tokens), len(tokens) + len(added))]
        tokens += text[shared : len(text) - 1]
        positions += added
        subtree_end += [0] * len(added)
        indices.append(np.array(path[start - 1 :], np.int64))
        previous = text[:-1]
    for node in path:
        subtree_end[node] = len(tokens)
    return TokenTree(
        *(np.array(x, np.int32) for x in (tokens, positions, subtree_end)),
        target_index=np.concatenate(indices),
        target_ids=np.concatenate([np.array(text[n:], np.int32) for text, n in zip(texts, starts, strict=True)]),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Texts with a common prefix, in lexicographic order, as many as go into one row; empty ones left out."""
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


def _rows(sizes: Sequence[int]) -> Iterator[tuple[int, list[list[int]]]]:
    """Row lengths, each with the trees that stand in every row; trees without tokens are left out."""
    shared = bucket(max((size for size in sizes if size <= ROW_LENGTH), default=0), least=_LEAST_ROW)
    trees: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        if size:
            trees.setdefault(max(bucket(size, least=_LEAST_ROW), shared), []).append(i)
    for length, members in sorted(trees.items(), reverse=True):
        rows = first_fit(np.array([sizes[i] for i in members]), length)
        yield length, [[members[i] for i in np.flatnonzero(rows == row)] for row in range(rows.max() + 1)]


@jax.jit
def target_log_probs(split: SplitModel, **rows: Array) -> tuple[Float[Array, "E"], Bool[Array, "E"]]:
    """Log-probability of every target of `padded_rows`, and whether no token has a higher score."""
    model = split.merge()
    asked, target_query = asked_states(model, rows), rows["target_query"]

    def of_tile(scores: Float[Array, "r S U W"]) -> tuple[Array, Array, Array]:
        return log_sum_exp(scores), jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1)

    log_sum_exps, max_logits, first = of_tiles(model, asked, rows["num_queries"], of_tile)
    tile = jnp.argmax(max_logits, axis=-1)
    ids, _ = Tiling.of(model).tokens(tile)
    best = jnp.take_along_axis(ids, jnp.take_along_axis(first, tile[:, None], axis=1), axis=1)[:, 0]
    scores = target_scores(model, asked, rows)
    log_probs = scores - jax.nn.logsumexp(log_sum_exps, axis=-1)[target_query]
    is_best = best[target_query] == rows["target_ids"]
    return constrain(log_probs, (None,), model.mesh), constrain(is_best, (None,), model.mesh)


@jax.jit
def _next_token_log_probs(split: SplitModel, tokens: Int[Array, "B T"], sizes: Int[Array, "B"]) -> Float[Array, "B V"]:
    model = split.merge()
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    subtree_end = jnp.where(positions < sizes[:, None], sizes[:, None], 0)
    hidden, _ = model.hidden(tokens, positions, subtree_end)
    last = jnp.take_along_axis(hidden, (sizes - 1)[:, None, None], axis=1)[:, 0]
    return constrain(jax.nn.log_softmax(model.logits(last), axis=-1), (None, None), model.mesh)
