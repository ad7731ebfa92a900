"""What a server drew, as steps along the tries of its prompts, and the probabilities that these steps should have.

An answer's tokens lead from prefix to prefix until it ends by the terminator, leaves what the trie holds, or takes a
token that no listed value has there. All prompts' tries stand one after the other: C children, M prefixes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from cft_jax.generate import TrieScore
from cft_jax.text.paths import prefix_log_probs
from cft_jax.text.trie import Trie

# The least probability of leaving the trie: servers round otherwise than we do, and rounding must prove nothing.
LEAST_LEFT = 1e-4


@dataclass(frozen=True, eq=False)
class Layout:
    """The tries of the prompts, and where each begins in arrays over all of them."""

    tries: Sequence[Trie]

    @cached_property
    def child_starts(self) -> Int[np.ndarray, "_"]:
        """First child of each trie; the last entry is C."""
        return np.append(0, np.cumsum([trie.child_ids.size for trie in self.tries]))

    @cached_property
    def prefix_starts(self) -> Int[np.ndarray, "_"]:
        """First prefix of each trie; the last entry is M."""
        return np.append(0, np.cumsum([trie.num_prefixes for trie in self.tries]))

    @cached_property
    def starts(self) -> Int[np.ndarray, "M"]:
        """First child of each prefix; every prefix has one."""
        parts = zip(self.tries, self.child_starts, strict=False)
        return np.concatenate([trie.child_offsets[:-1] + first for trie, first in parts])

    @cached_property
    def prefix(self) -> Int[np.ndarray, "C"]:
        """The prefix that each child follows."""
        return np.repeat(np.arange(self.starts.size), np.diff(np.append(self.starts, self.child_starts[-1])))

    @cached_property
    def is_cell(self) -> Bool[np.ndarray, "C"]:
        """Children behind which the trie holds nothing more: each answer on the trie takes exactly one of them."""
        return np.concatenate([trie.child_prefix for trie in self.tries]) < 0

    def sums(self, per_child: Float[np.ndarray, "C"]) -> Float[np.ndarray, "M"]:
        """Sums over the children of every prefix."""
        return np.add.reduceat(per_child, self.starts)


@dataclass(frozen=True, eq=False)
class Draws:
    """How often every step was drawn.

    Attributes:
      layout: of the tries.
      taken: draws of each child.
      left: draws that left the trie after each prefix.
    """

    layout: Layout
    taken: Float[np.ndarray, "C"]
    left: Float[np.ndarray, "M"]

    @classmethod
    def of(cls, layout: Layout, paths: Sequence[Sequence["AnswerPath"]]) -> "Draws":
        """The draws of every prompt, counted."""
        taken, left = np.zeros(layout.child_starts[-1]), np.zeros(layout.prefix_starts[-1])
        for index, drawn in enumerate(paths):
            for path in drawn:
                taken[np.asarray(path.children, np.int64) + layout.child_starts[index]] += 1
                if path.left is not None:
                    left[layout.prefix_starts[index] + path.left] += 1
        return cls(layout, taken, left)

    @property
    def num(self) -> Int[np.ndarray, "P"]:
        """Answers to each prompt."""
        return self.num_left + np.add.reduceat(self.taken * self.layout.is_cell, self.layout.child_starts[:-1]).astype(
            np.int64
        )

    @property
    def num_left(self) -> Int[np.ndarray, "P"]:
        """Answers to each prompt that are none of its values."""
        return np.add.reduceat(self.left, self.layout.prefix_starts[:-1]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class AnswerPath:
    """An answer along its trie: the children that it takes, and the prefix after which it leaves it, if it does."""

    children: tuple[int, ...]
    left: int | None


def path_of(trie: Trie, tokens: Sequence[int], *, ended: bool) -> AnswerPath:
    """The path of an answer's tokens, after which it `ended` or was cut; a stop token among them is no clean end."""
    children, prefix = [], 0
    for token in (*tokens, trie.terminator_id) if ended else tokens:
        first, last = trie.child_offsets[prefix : prefix + 2]
        child = int(first + np.searchsorted(trie.child_ids[first:last], token))
        is_stop = token == trie.terminator_id and len(children) < len(tokens)
        if is_stop or child == last or trie.child_ids[child] != token:
            return AnswerPath(tuple(children), prefix)
        children.append(child)
        if trie.child_prefix[child] < 0:
            return AnswerPath(tuple(children), None)
        prefix = int(trie.child_prefix[child])
    return AnswerPath(tuple(children), prefix)


class Reports:
    """The log-probabilities that a server reports, put beside the children of the tries.

    Args:
      layout: of the tries.
      text_of: the text of a token, as servers show it.
    """

    def __init__(self, layout: Layout, text_of: Callable[[int], str]) -> None:
        self.log_probs = np.full(layout.child_starts[-1], np.nan)
        self._layout, self._text_of = layout, text_of
        self._children: dict[tuple[int, int], dict[str, int]] = {}

    def add(self, index: int, path: AnswerPath, tokens: Sequence[tuple[str, Mapping[str, float]]]) -> None:
        """Takes up what is said about an answer to prompt `index`: for every token its text, and log-probabilities."""
        first = self._layout.child_starts[index]
        for child, (text, log_probs) in zip(path.children, tokens, strict=False):
            prefix = int(self._layout.prefix[first + child] - self._layout.prefix_starts[index])
            children = self._named(index, prefix)
            # The server may cut the same text into other tokens.
            if children.get(text) != child:
                return
            for name, log_prob in log_probs.items():
                if name in children:
                    self.log_probs[first + children[name]] = log_prob

    def _named(self, index: int, prefix: int) -> dict[str, int]:
        """The children of a prefix by their texts; servers show a token that ends an answer as it is, or as nothing."""
        if (index, prefix) not in self._children:
            trie = self._layout.tries[index]
            named = {}
            for child in range(*trie.child_offsets[prefix : prefix + 2].tolist()):
                token = int(trie.child_ids[child])
                named[self._text_of(token)] = child
                if token == trie.terminator_id:
                    named[""] = child
            self._children[index, prefix] = named
        return self._children[index, prefix]


@dataclass(frozen=True, eq=False)
class StepProbs:
    """What some model, sampled in some way, would draw: natural logarithms; after every prefix all sums to 1.

    Attributes:
      log_probs: of each child given its prefix, where a stop token in the terminator's stead counts as it does.
      log_left: that what follows a prefix is none of its children.
    """

    log_probs: Float[np.ndarray, "C"]
    log_left: Float[np.ndarray, "M"]

    @classmethod
    def of(cls, layout: Layout, scores: Sequence[TrieScore]) -> "StepProbs":
        """From the scores of the whole tries."""
        log_probs = np.concatenate([_with_other_stops(t, s) for t, s in zip(layout.tries, scores, strict=True)])
        total = layout.sums(np.exp(log_probs))
        left = np.clip(1 - total, LEAST_LEFT, 1 - LEAST_LEFT)
        return cls(log_probs + np.log((1 - left) / total)[layout.prefix], np.log(left))

    def log_likelihood(self, draws: Draws) -> float:
        """Of all draws, in nats."""
        return _dot(draws.taken, self.log_probs) + _dot(draws.left, self.log_left)

    def cells(self, layout: Layout) -> list[Float[np.ndarray, "_"]]:
        """Probabilities of the cells of every prompt, in the order of their children."""
        found = []
        for trie, first, last in zip(layout.tries, layout.child_starts, layout.child_starts[1:], strict=False):
            own = self.log_probs[first:last]
            parents = np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))
            found.append(np.exp(prefix_log_probs(trie, own)[parents] + own)[trie.child_prefix < 0])
        return found


def _dot(counts: Float[np.ndarray, "K"], logs: Float[np.ndarray, "K"]) -> float:
    """Sum of the products where there are counts: what never happened may have no probability."""
    some = counts > 0
    return float(counts[some] @ logs[some])


def _with_other_stops(trie: Trie, score: TrieScore) -> Float[np.ndarray, "K"]:
    log_probs = score.child_log_probs.copy()
    ends = np.flatnonzero(trie.child_ids == trie.terminator_id)
    of_prefix = np.full(trie.num_prefixes, -1)
    of_prefix[np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))[ends]] = ends
    others = score.other_stop_log_probs - score.prefix_log_probs[trie.leaf_prefix]
    end = of_prefix[trie.leaf_prefix]
    log_probs[end] = np.logaddexp(log_probs[end], others)
    return log_probs
