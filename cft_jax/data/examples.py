"""From tries to examples: a prompt with some of its trie's prefixes, their targets, and what the positions weigh.

One builder serves every objective. `path` is an example with one drawn string, `paths` and packed hard targets are
examples with several, whose common prefixes appear once, and `exact` is an example with all strings and their
probabilities. The weight of the target position at prefix n is Σ weight(s) / T(s) over the example's strings s that
begin with n, where T counts the tokens of s and its terminator (arXiv 2605.11845: mean over steps); or Σ weight(s) for
the divergence of sequences.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from cft_jax.text.tree_rows import cut_tree, ranges
from cft_jax.text.trie import Forest, Trie


@dataclass(frozen=True, eq=False)
class TrieExamples:
    """B examples before padding, with N prefixes and K target entries in all.

    Attributes:
      prompts: token ids of each example's prompt.
      node_starts: int64[B + 1]; the prefixes of example b are node_starts[b] to node_starts[b + 1], depth-first, the
        empty prefix first.
      token: last token of the prefix; -1 for the empty one.
      depth: its number of tokens.
      subtree_end: one past the last prefix below it, counted from the example's first.
      weight: of its target position; 0 where it is none.
      target_starts: int64[N + 1]; where the entries of each prefix begin.
      target_ids, target_probs: tokens that can follow the prefix and their probabilities.
      mean_weight: what each example counts in the mean.
      task: which of the tasks that examples were asked for each example belongs to, ascending.
    """

    prompts: Sequence[Int32[np.ndarray, "_"]]
    node_starts: Int64[np.ndarray, "_"]
    token: Int32[np.ndarray, "N"]
    depth: Int32[np.ndarray, "N"]
    subtree_end: Int64[np.ndarray, "N"]
    weight: Float64[np.ndarray, "N"]
    target_starts: Int64[np.ndarray, "_"]
    target_ids: Int32[np.ndarray, "K"]
    target_probs: Float64[np.ndarray, "K"]
    mean_weight: Float64[np.ndarray, "B"]
    task: Int64[np.ndarray, "B"]

    def __len__(self) -> int:
        return self.mean_weight.size

    def sizes(self) -> Int64[np.ndarray, "B 3"]:
        """Tokens, target positions and target entries of each example."""
        prompt_lengths = np.array([prompt.size for prompt in self.prompts], dtype=np.int64)
        counted = self.weight > 0
        num_targets = np.where(counted, np.diff(self.target_starts), 0)
        sums = np.zeros((2, self.token.size + 1), dtype=np.int64)
        np.cumsum(counted, out=sums[0, 1:])
        np.cumsum(num_targets, out=sums[1, 1:])
        positions, targets = np.diff(sums[:, self.node_starts], axis=1)
        return np.stack([prompt_lengths + np.diff(self.node_starts) - 1, positions, targets], axis=1)


def examples_of_strings(
    forest: Forest,
    prompts: Sequence[Int32[np.ndarray, "_"]],
    tries: Int64[np.ndarray, "B"],
    owner: Int64[np.ndarray, "S"],
    strings: Int64[np.ndarray, "S"],
    weights: Float64[np.ndarray, "S"],
    mean_weight: Float64[np.ndarray, "B"],
    *,
    per_position: bool,
) -> TrieExamples:
    """Examples that hold the prefixes of given strings, each prefix once.

    Args:
      forest: tries that hold the strings.
      prompts: of each example.
      tries: which trie each example's strings belong to.
      owner: the example of each string; every example needs one.
      strings: number of each string in its output space; a string may occur several times.
      weights: of each string, positive.
      mean_weight: what each example counts in the mean.
      per_position: whether a string's weight is divided among its target positions (mean over steps) or given to each.
    """
    arrays = forest.arrays
    trie = tries[owner]
    first_prefix = forest.prefix_starts[trie]
    prefix = arrays["leaf_prefix"][forest.leaf_starts[trie] + strings].astype(np.int64)
    num_positions = arrays["depth"][first_prefix + prefix].astype(np.int64) + 1
    position_weight = weights / num_positions if per_position else weights
    # The prefixes of all strings, from the whole string up, as keys that sort by example and depth-first within it.
    stride = np.int64(int(np.diff(forest.prefix_starts).max()) + 1)
    keys, key_weights = [], []
    active = np.arange(strings.size)
    while active.size:
        keys.append(owner[active] * stride + prefix[active])
        key_weights.append(position_weight[active])
        active = active[prefix[active] > 0]
        prefix[active] = arrays["parent"][first_prefix[active] + prefix[active]]
    kept, which = np.unique(np.concatenate(keys), return_inverse=True)
    weight = np.bincount(which, weights=np.concatenate(key_weights), minlength=kept.size)

    example, local = np.divmod(kept, stride)
    node_starts = np.searchsorted(example, np.arange(tries.size + 1)).astype(np.int64)
    source = forest.prefix_starts[tries[example]] + local
    subtree_end = np.searchsorted(kept, example * stride + arrays["subtree_end"][source]) - node_starts[example]
    # Offsets of children have one entry more per trie than there are prefixes.
    offset = source + tries[example]
    child_base = forest.child_starts[tries[example]]
    first_child = child_base + arrays["child_offsets"][offset]
    num_children = arrays["child_offsets"][offset + 1] - arrays["child_offsets"][offset]
    entries = ranges(first_child, num_children)
    return TrieExamples(
        prompts=prompts,
        node_starts=node_starts,
        token=arrays["token"][source],
        depth=arrays["depth"][source],
        subtree_end=subtree_end.astype(np.int64),
        weight=weight,
        target_starts=np.append(0, num_children.cumsum()),
        target_ids=arrays["child_ids"][entries],
        target_probs=arrays["child_probs"][entries],
        mean_weight=mean_weight,
        task=np.arange(tries.size),
    )


def examples_of_tries(
    tries: Sequence[Trie],
    prompts: Sequence[Int32[np.ndarray, "_"]],
    weights: Sequence[Float64[np.ndarray, "_"]],
    mean_weight: Float64[np.ndarray, "B"],
) -> TrieExamples:
    """An example per trie with all its prefixes and a given weight for each prefix's target position."""
    sizes = [trie.num_prefixes for trie in tries]
    num_children = np.concatenate([np.diff(trie.child_offsets) for trie in tries])
    return TrieExamples(
        prompts=prompts,
        node_starts=np.append(0, np.cumsum(sizes)),
        token=np.concatenate([trie.token for trie in tries]),
        depth=np.concatenate([trie.depth for trie in tries]),
        subtree_end=np.concatenate([trie.subtree_end for trie in tries]).astype(np.int64),
        weight=np.concatenate(weights),
        target_starts=np.append(0, num_children.cumsum()),
        target_ids=np.concatenate([trie.child_ids for trie in tries]),
        target_probs=np.concatenate([trie.child_probs for trie in tries]),
        mean_weight=mean_weight,
        task=np.arange(mean_weight.size),
    )


def joined_examples(parts: Sequence[TrieExamples], tasks: Sequence[Int64[np.ndarray, "_"]]) -> TrieExamples:
    """The examples of several sources as one, in the order of their tasks.

    Args:
      parts: the examples of each source.
      tasks: for each source, the numbers that its tasks have among all.
    """
    names = ("token", "depth", "subtree_end", "weight", "target_ids", "target_probs", "mean_weight")
    joined = TrieExamples(
        prompts=[prompt for part in parts for prompt in part.prompts],
        node_starts=np.append(0, np.cumsum(np.concatenate([np.diff(part.node_starts) for part in parts]))),
        target_starts=np.append(0, np.cumsum(np.concatenate([np.diff(part.target_starts) for part in parts]))),
        task=np.concatenate([numbers[part.task] for part, numbers in zip(parts, tasks, strict=True)]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )
    order = np.argsort(joined.task, kind="stable")
    num_nodes = np.diff(joined.node_starts)[order]
    nodes = ranges(joined.node_starts[order], num_nodes)
    return _gathered(joined, order, num_nodes, nodes, joined.subtree_end[nodes], None, joined.mean_weight[order])


def split_examples(examples: TrieExamples, max_nodes: int) -> TrieExamples:
    """Examples of at most `max_nodes` prefixes beside the empty one; longer ones become several over the same prompt.

    Each part continues the example where the part before stopped and repeats the ancestors of its first prefix; these
    are target positions only in the part that has them first. Only the first part has the example's weight in the
    mean, so sums over examples stay the same.

    Raises:
      ValueError: `max_nodes` is not larger than the longest string.
    """
    rows = [
        (example, start, row)
        for example, (start, stop) in enumerate(itertools.pairwise(examples.node_starts.tolist()))
        for row in cut_tree(examples.subtree_end[start:stop], max_nodes + 1)
    ]
    return _gathered(
        examples,
        np.array([example for example, _, _ in rows]),
        np.array([row.nodes.size for _, _, row in rows]),
        np.concatenate([start + row.nodes for _, start, row in rows]),
        np.concatenate([row.subtree_end for _, _, row in rows]),
        np.concatenate([np.arange(row.nodes.size) >= row.num_ancestors for _, _, row in rows]),
        np.array([0.0 if row.num_ancestors else examples.mean_weight[example] for example, _, row in rows]),
    )


def _gathered(
    examples: TrieExamples,
    source: np.ndarray,
    num_nodes: np.ndarray,
    nodes: np.ndarray,
    subtree_end: np.ndarray,
    counted: np.ndarray | None,
    mean_weight: np.ndarray,
) -> TrieExamples:
    """Examples made of prefixes of others: of example `source[i]` the next `num_nodes[i]` of `nodes`, with new ends.

    Prefixes that are not `counted` lose their weight and their targets.
    """
    counted = np.ones(nodes.size, dtype=bool) if counted is None else counted
    num_targets = np.where(counted, np.diff(examples.target_starts)[nodes], 0)
    entries = ranges(examples.target_starts[nodes], num_targets)
    return TrieExamples(
        prompts=[examples.prompts[example] for example in source.tolist()],
        node_starts=np.append(0, num_nodes.cumsum()),
        token=examples.token[nodes],
        depth=examples.depth[nodes],
        subtree_end=subtree_end,
        weight=np.where(counted, examples.weight[nodes], 0.0),
        target_starts=np.append(0, num_targets.cumsum()),
        target_ids=examples.target_ids[entries],
        target_probs=examples.target_probs[entries],
        mean_weight=mean_weight,
        task=examples.task[source],
    )
