"""The trie of an analytic space, computed where it is needed and never as a whole.

`AnalyticTrie.children` gives the tokens that can follow any prefix and their probabilities. `drawn_forest` makes the
tries of drawn strings, for all prompts of a batch at once; `AnalyticTrie.expand` those of the most probable prefixes.
Both are ordinary tries whose prefixes have all their children, but only some of the children are followed: the
others' `child_prefix` is `CUT`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from cft_jax.distributions.analytic_space import AnalyticSpace
from cft_jax.text.number_grammar import NumberGrammar, NumberState, NumberTokens
from cft_jax.text.trie import CUT, Forest, Trie, grow_forest

# Prefixes expanded at once: bounds the memory of one step to some tens of MiB with groups of three digits.
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class AnalyticTrie:
    """The trie of an analytic space in one tokenizer's tokens.

    Attributes:
      space: the strings and their probabilities.
      tokens: the tokens of numbers and the terminator.
    """

    space: AnalyticSpace
    tokens: NumberTokens

    def encode(self, integers: Int[np.ndarray, "N"]) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N"]]:
        """Tokens of the strings of these k without the terminator, -1 after a string's end, and their numbers."""
        return self.tokens.numbers.encode(integers, self.space.num_decimals)

    def children(self, prefix: Sequence[int]) -> tuple[Int[np.ndarray, "C"], Float[np.ndarray, "C"]]:
        """Token ids that can follow a prefix, ascending, and their probabilities (0 where the prefix has none).

        Raises:
          KeyError: no string begins with `prefix`.
        """
        grammar = NumberGrammar(self.tokens, [self.space])
        children = grammar.children(self._find(grammar, prefix))
        total = children.mass.sum()
        return self.tokens.ids[children.slot], children.mass / total if total > 0 else children.mass

    def expand(self, max_prefixes: int, max_depth: int, drawn: Int[np.ndarray, "N"]) -> "Expansion":
        """The most probable prefixes, and the paths of drawn strings below them.

        Args:
          max_prefixes: how many prefixes to take, at least 1; with as many as there are, the trie is the whole one.
          max_depth: the longest prefix to take, in tokens.
          drawn: k of strings drawn from the space, for an unbiased estimate of what lies below; may be empty.
        """
        grammar = NumberGrammar(self.tokens, [self.space])
        paths, path_lengths = _most_probable(grammar, max_prefixes, max_depth)
        strings, string_lengths = self.encode(drawn)
        width = max(paths.shape[1], strings.shape[1])
        rows = np.concatenate([_widened(paths, width), _widened(strings, width)])
        lengths = np.concatenate([path_lengths, string_lengths])
        forest, weights = _forest(grammar, rows, lengths, np.zeros(lengths.size, dtype=np.int64))
        whole = forest.trie(0)
        exact = np.zeros(whole.num_prefixes, dtype=bool)
        exact[whole.leaf_prefix[: path_lengths.size]] = True
        leaf_prefix = whole.leaf_prefix[path_lengths.size :]
        trie = replace(whole, leaf_prefix=leaf_prefix, leaf_probs=whole.leaf_probs[path_lengths.size :])
        visits = _along_paths(trie, np.full(drawn.size, 1.0 / max(drawn.size, 1)))
        per_position = _along_paths(trie, 1.0 / (max(drawn.size, 1) * (string_lengths + 1.0)))
        return Expansion(trie, exact, np.where(exact, weights, per_position), np.where(exact, trie.reach, visits))

    def child_numbers(self, trie: Trie, children: Int[np.ndarray, "C"]) -> Float[np.ndarray, "C"]:
        """The mean of the numbers below some children of a trie of this space, weighed by their probabilities.

        An interval of strings counts with its middle.

        Args:
          trie: of an `Expansion` of this trie.
          children: indices in `trie.child_ids`; a terminator stands for its string.
        """
        grammar = NumberGrammar(self.tokens, [self.space])
        slots = np.full(trie.num_prefixes, -1)
        slots[1:] = self.tokens.slots(trie.token[1:])
        states = _states(grammar, np.zeros(trie.num_prefixes, dtype=np.int64), trie.parent, trie.depth, slots)
        parents = np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))[children]
        ends = trie.child_ids[children] == trie.terminator_id
        integers = np.empty(children.size)
        whole = states.take(parents[ends])
        integers[ends] = np.where(whole.negative, -whole.value, whole.value)
        open_slots = self.tokens.slots(trie.child_ids[children[~ends]])
        prefix, start, stop = grammar.intervals(states.take(parents[~ends]).extended(open_slots, self.tokens))
        # A little more than their masses, so that intervals without any have a mean too.
        weights = self.space.interval_masses(start, stop) + np.finfo(np.float64).tiny
        sums = [
            np.bincount(prefix, weights=w, minlength=open_slots.size) for w in (weights, weights * (start + stop - 1))
        ]
        integers[~ends] = sums[1] / (2 * sums[0])
        return integers / 10.0**self.space.num_decimals

    def _find(self, grammar: NumberGrammar, prefix: Sequence[int]) -> NumberState:
        state = NumberState.empty(np.zeros(1, dtype=np.int64))
        for token in prefix:
            slots = grammar.children(state).slot
            slot = slots[self.tokens.ids[slots] == token]
            if slot.size == 0 or slot[0] == self.tokens.terminator:
                raise KeyError(tuple(prefix))
            state = state.extended(slot, self.tokens)
        return state


@dataclass(frozen=True, eq=False)
class Expansion:
    """Part of an analytic trie. M prefixes.

    The sum of weight times loss over all prefixes is the exact objective but for the prefixes left out, whose part
    the drawn strings' prefixes estimate without bias: a drawn string counts at those of its prefixes that are not
    among the most probable ones. Without drawn strings that part is missing.

    Attributes:
      trie: the most probable prefixes and all prefixes of the drawn strings; its leaves are the drawn strings.
      exact: whether a prefix is one of the most probable ones.
      mean_weights: Σ probability(s) / T(s) over the strings s below a prefix, T(s) their target positions (the mean
        over these); below the exact prefixes, its estimate by the drawn strings.
      sequence_weights: the probability of passing through a prefix (sum over its target positions), or its estimate.
    """

    trie: Trie
    exact: Bool[np.ndarray, "M"]
    mean_weights: Float[np.ndarray, "M"]
    sequence_weights: Float[np.ndarray, "M"]


def drawn_forest(tries: Sequence[AnalyticTrie], drawn: Sequence[Int[np.ndarray, "_"]]) -> Forest:
    """The tries of the prefixes of drawn strings, several prompts at once.

    Args:
      tries: one per prompt, all in the same tokens.
      drawn: for each, the k of its drawn strings, at least one; the same string may occur several times.

    Returns:
      Tries in the order of the prompts. `leaf_prefix` is in the order of the drawn strings, `leaf_probs` their
      probabilities in the whole space.
    """
    grammar = NumberGrammar(tries[0].tokens, [trie.space for trie in tries])
    groups = np.repeat(np.arange(len(tries)), [integers.size for integers in drawn])
    integers = np.concatenate(list(drawn)).astype(np.int64)
    decimals = np.array([trie.space.num_decimals for trie in tries])[groups]
    encoded = {d: tries[0].tokens.numbers.encode(integers[decimals == d], int(d)) for d in np.unique(decimals)}
    rows = np.full((integers.size, max(tokens.shape[1] for tokens, _ in encoded.values())), -1, dtype=np.int32)
    lengths = np.zeros(integers.size, dtype=np.int64)
    for num_decimals, (tokens, counts) in encoded.items():
        where = np.flatnonzero(decimals == num_decimals)
        rows[where, : tokens.shape[1]] = tokens
        lengths[where] = counts
    return _forest(grammar, rows, lengths, groups)[0]


def _widened(rows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1)


def _along_paths(trie: Trie, leaf_weights: np.ndarray) -> Float[np.ndarray, "M"]:
    """For every prefix, the sum of the weights of the leaves at it or below."""
    weights = np.bincount(trie.leaf_prefix, weights=leaf_weights, minlength=trie.num_prefixes)
    # Leaves lie in the range of indices below a prefix, so their sum is a difference of running sums.
    running = np.append(0.0, weights.cumsum())
    return running[trie.subtree_end] - running[np.arange(trie.num_prefixes)]


def _forest(
    grammar: NumberGrammar, rows: np.ndarray, lengths: np.ndarray, groups: np.ndarray
) -> tuple[Forest, Float[np.ndarray, "M"]]:
    """Tries of all prefixes of token rows with their children, and of each prefix what `Children.weight` sums up to.

    A row need not be a whole string, and rows may repeat; groups ascend, and none is left out.
    """
    distinct, first, inverse = np.unique(
        np.column_stack([groups, rows]), axis=0, return_index=True, return_inverse=True
    )
    inverse = inverse.reshape(-1)
    forest = grow_forest(
        distinct[:, 1:].astype(np.int32),
        lengths[first],
        groups[first],
        np.zeros(first.size),
        terminator_id=grammar.tokens.terminator_id,
        describe=str,
    )
    starts = forest.prefix_starts
    owner = np.repeat(np.arange(len(forest)), np.diff(starts))
    parent = forest.arrays["parent"] + starts[owner]
    depth, token = forest.arrays["depth"], forest.arrays["token"]
    inner = np.flatnonzero(depth > 0)
    slots = np.full(owner.size, -1)
    slots[inner] = grammar.tokens.slots(token[inner])
    children = grammar.children(_states(grammar, owner, parent, depth, slots))
    reach = np.bincount(children.prefix, weights=children.mass, minlength=owner.size)
    num_children = np.bincount(children.prefix, minlength=owner.size)
    child_starts = np.append(0, num_children.cumsum())
    num_slots = grammar.tokens.ids.size
    keys = children.prefix * num_slots + grammar.tokens.ranks[children.slot]
    ends = children.slot == grammar.tokens.terminator
    child_prefix = np.where(ends, -1, CUT)
    entry = np.searchsorted(keys, parent[inner] * num_slots + grammar.tokens.ranks[slots[inner]])
    child_prefix[entry] = inner - starts[owner[inner]]
    total = reach[children.prefix]
    end_masses = np.bincount(children.prefix, weights=np.where(ends, children.mass, 0.0), minlength=owner.size)
    leaf = forest.arrays["leaf_prefix"][inverse]
    arrays = {
        **forest.arrays,
        "reach": reach,
        # One more entry per trie than prefixes, counted from the trie's first child.
        "child_offsets": np.concatenate(
            [child_starts[a : b + 1] - child_starts[a] for a, b in itertools.pairwise(starts)]
        ),
        "child_ids": grammar.tokens.ids[children.slot],
        "child_probs": np.divide(children.mass, total, out=np.zeros_like(total), where=total > 0),
        "child_prefix": child_prefix.astype(np.int32),
        "leaf_prefix": leaf,
        "leaf_probs": end_masses[leaf + starts[groups]],
    }
    leaf_starts = np.searchsorted(groups, np.arange(len(forest) + 1))
    weights = np.bincount(children.prefix, weights=children.weight, minlength=owner.size)
    return Forest(arrays, starts, child_starts[starts], leaf_starts, grammar.tokens.terminator_id), weights


def _states(
    grammar: NumberGrammar, owner: np.ndarray, parent: np.ndarray, depth: np.ndarray, slots: np.ndarray
) -> NumberState:
    """What has been read at every prefix of a forest."""
    states = NumberState(*(field.copy() for field in NumberState.empty(owner)))
    for level in range(1, int(depth.max()) + 1):
        nodes = np.flatnonzero(depth == level)
        extended = states.take(parent[nodes]).extended(slots[nodes], grammar.tokens)
        for field, new in zip(states, extended, strict=True):
            field[nodes] = new
    return states


def _most_probable(
    grammar: NumberGrammar, max_prefixes: int, max_depth: int
) -> tuple[Int[np.ndarray, "M T"], Int[np.ndarray, "M"]]:
    """The tokens and depths of the prefixes of largest reach; a prefix's ancestors are always among them."""
    states = NumberState.empty(np.zeros(1, dtype=np.int64))
    paths = [np.zeros((1, 0), dtype=np.int32)]
    reaches = [np.ones(1)]
    threshold = 0.0
    for _ in range(max_depth):
        parent, slot, reach = _followed(grammar, states, reaches[-1], threshold)
        everything = _coarse(np.concatenate([*reaches, reach]))
        if everything.size > max_prefixes:
            threshold = np.partition(everything, -max_prefixes)[-max_prefixes]
        kept = np.flatnonzero(_coarse(reach) >= threshold)
        if kept.size == 0:
            break
        states = states.take(parent[kept]).extended(slot[kept], grammar.tokens)
        paths.append(np.column_stack([paths[-1][parent[kept]], grammar.tokens.ids[slot[kept]]]))
        reaches.append(reach[kept])
    depths = np.repeat(np.arange(len(reaches)), [reach.size for reach in reaches])
    # Reach never grows downwards; where it stays the same, the shallower prefix comes first.
    chosen = np.lexsort((depths, -_coarse(np.concatenate(reaches))))[:max_prefixes]
    rows = np.concatenate([_widened(path, paths[-1].shape[1]) for path in paths])
    return rows[chosen], depths[chosen]


def _followed(
    grammar: NumberGrammar, states: NumberState, reach: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All children of some prefixes but the terminators, of at least this reach: (parent, slot, reach)."""
    found = []
    for begin in range(0, reach.size, _CHUNK):
        chunk = np.arange(begin, min(begin + _CHUNK, reach.size))
        children = grammar.children(states.take(chunk))
        total = np.bincount(children.prefix, weights=children.mass, minlength=chunk.size)[children.prefix]
        share = np.divide(children.mass, total, out=np.zeros_like(total), where=total > 0)
        reaches = reach[chunk][children.prefix] * share
        kept = (children.slot != grammar.tokens.terminator) & (_coarse(reaches) >= threshold)
        found.append((chunk[children.prefix[kept]], children.slot[kept], reaches[kept]))
    parents, slots, reaches = (np.concatenate(column) for column in zip(*found, strict=True))
    return parents, slots, reaches


def _coarse(reach: np.ndarray) -> np.ndarray:
    """Reach to three digits, by which prefixes are compared.

    Symmetric distributions have pairs of equal reach, and the last digits, which depend on the CPU, must not decide
    which of the two is taken. Steps are multiples of 1/pi, so that no fraction lies half-way between two.
    """
    mantissa, exponent = np.frexp(reach)
    return np.ldexp(np.rint(mantissa * (1000 * np.pi)), exponent)
