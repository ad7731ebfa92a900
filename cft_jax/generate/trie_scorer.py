"""Exact log-probabilities of a whole output space, by attention over its trie.

The prompt runs through the model once. The trie's prefixes follow in depth-first order, cut into rows of bounded size;
each row begins with the ancestors of its first prefix, which are the only prefixes outside the row that anything in it
descends from. One forward pass over the rows gives the next-token distribution after every prefix, where the
log-probabilities of the children are read off.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from cft_jax.common.errors import UserError
from cft_jax.generate.prefill import asked_states, check_prompts, prefill, row_axis
from cft_jax.generate.split_model import SplitModel
from cft_jax.generate.vocabulary import log_z, target_scores
from cft_jax.models.transformer import KVCache, Transformer
from cft_jax.sharding.rules import constrain, num_shards
from cft_jax.text.paths import prefix_log_probs, string_log_probs
from cft_jax.text.tree_rows import TokenTree, bucket, cut_tree, padded_rows, ranges
from cft_jax.text.trie import Trie

# Tokens per row: longer rows repeat fewer ancestors and spend more on attention, which is quadratic in them.
ROW_LENGTHS = (64, 128, 256, 512)
# Tokens of one call for each of the mesh's shards of the batch, by default.
TOKENS_PER_CALL = 2048
# A row is at least so many times as long as the longest value, where it may be: its ancestors are repeated.
_LONGER = 8


def score_trie(model: Transformer, prompt_ids: Sequence[int], trie: Trie) -> Float64[np.ndarray, "N"]:
    """Log-probabilities of every value of an output space, terminator included, in the order of the space.

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


def row_length(deepest: int, prefixes: int = 1 << 30) -> int:
    """The length of the rows of so many prefixes, of which the deepest has so many tokens."""
    enough = min(prefixes, _LONGER * (deepest + 1))
    return next((length for length in ROW_LENGTHS if length >= enough), ROW_LENGTHS[-1])


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Some prefixes of a trie, and the next tokens (targets) that are asked for after them.

    Attributes:
      trie: the trie.
      prefixes: those of the trie that are asked about, ascending, with all their ancestors.
      subtree_end: of each of these, counted among them.
      children: the children of the trie that are targets.
      leaves: the values whose whole strings are among the prefixes; the O other stop ids after each are targets.
      target_index: which of `prefixes` each target follows, ascending.
      target_ids: its token.
      order: its number when first all children are counted, then the stop ids of every leaf.
    """

    trie: Trie
    prefixes: Int[np.ndarray, "M"]
    subtree_end: Int[np.ndarray, "M"]
    children: Int[np.ndarray, "A"]
    leaves: Int[np.ndarray, "S"]
    target_index: Int[np.ndarray, "E"]
    target_ids: Int[np.ndarray, "E"]
    order: Int[np.ndarray, "E"]

    @classmethod
    def of(cls, trie: Trie, stop_ids: Int[np.ndarray, "_"], prefixes: Int[np.ndarray, "_"] | None) -> "ScoreRequest":
        """All children of the given prefixes (None: of every prefix), and the stop ids after whole strings.

        Raises:
          ValueError: a prefix comes without its ancestors.
        """
        chosen = np.arange(trie.num_prefixes) if prefixes is None else np.unique(prefixes)
        index = np.full(trie.num_prefixes, -1)
        index[chosen] = np.arange(chosen.size)
        if chosen.size == 0 or chosen[0] != 0 or (index[trie.parent[chosen[1:]]] < 0).any():
            raise ValueError("prefixes to score must come with all their ancestors, the empty prefix among them")
        others = stop_ids[stop_ids != trie.terminator_id]
        leaves = np.flatnonzero(index[trie.leaf_prefix] >= 0)
        num_children = np.diff(trie.child_offsets)[chosen]
        children = ranges(trie.child_offsets[:-1][chosen], num_children)
        parents = np.repeat(np.arange(chosen.size), num_children)
        follows = np.concatenate([parents, np.repeat(index[trie.leaf_prefix[leaves]], others.size)])
        ids = np.concatenate([trie.child_ids[children], np.tile(others, leaves.size)])
        order = np.argsort(follows, kind="stable")
        subtree_end = np.searchsorted(chosen, trie.subtree_end[chosen])
        return cls(trie, chosen, subtree_end, children, leaves, follows[order], ids[order], order)

    def row_length(self) -> int:
        """The shortest of `ROW_LENGTHS` that holds all prefixes, or is long beside their ancestors.

        Raises:
          UserError: a string is too long for any row.
        """
        deepest, longest = int(self.trie.depth[self.prefixes].max()), ROW_LENGTHS[-1]
        if deepest >= longest:
            raise UserError(f"a value of the output space has {deepest} tokens; at most {longest - 1} can be scored")
        return row_length(deepest, self.prefixes.size)

    def rows(self, prompt: Sequence[int], length: int) -> Iterator[tuple[slice, TokenTree]]:
        """Rows of at most `length` tokens that hold every prefix, and which of the targets each row asks for."""
        for row in cut_tree(self.subtree_end, length):
            first, nodes = row.nodes[row.num_ancestors], self.prefixes[row.nodes]
            targets = slice(*np.searchsorted(self.target_index, [first, row.nodes[-1] + 1]).tolist())
            yield (
                targets,
                TokenTree(
                    # The empty prefix is the prompt's last token.
                    tokens=np.where(nodes == 0, prompt[-1], self.trie.token[nodes]),
                    positions=len(prompt) - 1 + self.trie.depth[nodes],
                    subtree_end=row.subtree_end,
                    target_index=self.target_index[targets] - first + row.num_ancestors,
                    target_ids=self.target_ids[targets],
                ),
            )

    def result(self, log_probs: Float64[np.ndarray, "E"]) -> TrieScore:
        """The score of the trie, from the log-probabilities of all targets."""
        by_number = np.empty_like(log_probs)
        by_number[self.order] = log_probs
        children, stops = np.split(by_number, [self.children.size])
        child_log_probs = np.full(self.trie.child_ids.size, np.nan)
        child_log_probs[self.children] = children
        stop_log_probs = np.full(self.trie.leaf_prefix.size, np.nan)
        stops = stops.reshape(self.leaves.size, stops.size // max(self.leaves.size, 1))
        stop_log_probs[self.leaves] = np.logaddexp.reduce(stops, axis=1, initial=-np.inf)
        prefixes = prefix_log_probs(self.trie, child_log_probs)
        strings = string_log_probs(self.trie, child_log_probs)
        return TrieScore(child_log_probs, prefixes, strings, prefixes[self.trie.leaf_prefix] + stop_log_probs)


class TrieScorer:
    """Scores tries with one model, whose weights are taken apart once.

    Args:
      model: the language model.
      stop_ids: tokens that end a generation; those that are not a trie's terminator are scored apart.
      tokens_per_call: tokens in one forward pass, for each of the mesh's shards of the batch.
    """

    def __init__(
        self, model: Transformer, *, stop_ids: Sequence[int] = (), tokens_per_call: int = TOKENS_PER_CALL
    ) -> None:
        self._split = SplitModel.of(model)
        self._vocab_size = model.config.vocab_size
        self._stop_ids = np.unique(np.asarray(stop_ids, np.int32))
        self._tokens_per_call = tokens_per_call * num_shards("batch", model.mesh)

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        tries: Sequence[Trie],
        *,
        prefixes: Sequence[Int[np.ndarray, "_"]] | None = None,
    ) -> list[TrieScore]:
        """Scores each trie after its prompt.

        `prefixes` names for each trie the prefixes to ask the model about, together with their ancestors; by default
        all.

        Raises:
          UserError: a prompt is empty, or a token is not in the model's vocabulary.
        """
        check_prompts(prompts, self._vocab_size)
        parts = [None] * len(tries) if prefixes is None else prefixes
        requests = [ScoreRequest.of(trie, self._stop_ids, part) for trie, part in zip(tries, parts, strict=True)]
        for request in requests:
            if request.target_ids.max() >= self._vocab_size:
                raise UserError(
                    f"the output space or the stop ids hold token {request.target_ids.max()}, and the model's "
                    f"vocabulary ends at {self._vocab_size - 1}; give the tokenizer that belongs to the model"
                )
        # Prompts that share shapes, as many at a time as one call has rows.
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            shapes.setdefault((bucket(len(prompt) - 1, least=32), request.row_length()), []).append(index)
        scores: dict[int, TrieScore] = {}
        for lengths, indices in shapes.items():
            rows = max(self._tokens_per_call // lengths[1], 1)
            for start in range(0, len(indices), rows):
                batch = indices[start : start + rows]
                found = self._log_probs([prompts[i] for i in batch], [requests[i] for i in batch], lengths, rows)
                scores |= {i: requests[i].result(log_probs) for i, log_probs in zip(batch, found, strict=True)}
        return [scores[index] for index in range(len(requests))]

    def _log_probs(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[ScoreRequest], lengths: tuple[int, int], rows: int
    ) -> list[Float64[np.ndarray, "_"]]:
        """Log-probabilities of all targets of each request; `lengths` of a prompt's cache and of a row."""
        context = prefill(self._split, prompts, rows=rows if len(prompts) > 1 else 1, length=lengths[0])
        trees = [
            (index, *row)
            for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
            for row in request.rows(prompt, lengths[1])
        ]
        rows = rows if len(trees) > 1 else 1
        sent = []
        for start in range(0, len(trees), rows):
            call = trees[start : start + rows]
            prompt = np.zeros(rows, np.int32)
            prompt[: len(call)] = [index for index, *_ in call]
            arrays = padded_rows([[tree] for *_, tree in call], num_rows=rows, length=lengths[1])
            # All calls are sent before the first result is read.
            sent.append((call, target_log_probs(self._split, context, prompt, **arrays)))
        log_probs = [np.full(request.target_ids.size, np.nan) for request in requests]
        for call, found in sent:
            ends = np.cumsum([tree.target_ids.size for *_, tree in call])
            for (index, targets, _), part in zip(call, np.split(np.asarray(found), ends)[:-1], strict=True):
                log_probs[index][targets] = part
        return log_probs


@jax.jit
def target_log_probs(split: SplitModel, context: KVCache, prompt: Int[Array, "B"], **rows: Array) -> Float[Array, "E"]:
    """Log-probability of every target of `padded_rows`; `prompt` is each row's of the context."""
    model = split.merge()
    own = jax.tree.map(lambda x: x[:, prompt] if row_axis(x) else x[prompt], context)
    asked, target_query = asked_states(model, rows, (own,)), rows["target_query"]
    scores = target_scores(model, asked, rows)
    largest = jax.ops.segment_max(scores, target_query, num_segments=rows["queries"].size)
    log_zs = log_z(model, asked, rows["num_queries"], largest)
    return constrain(scores - log_zs[target_query], (None,), model.mesh)
