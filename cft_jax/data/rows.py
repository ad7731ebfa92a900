"""From tries to rows: which prefixes a row holds, what its steps weigh, and the padded arrays of a batch.

One builder serves every objective. `path` is a row with one drawn string, `paths` and packed hard targets are rows
with several, whose common beginnings appear once, and `exact` is a row with all strings and their probabilities. The
weight of a step at prefix n is Σ weight(s) / T(s) over the row's strings s that begin with n, where T counts the
tokens of s and its terminator (arXiv 2605.11845: mean over steps); or Σ weight(s) for the divergence of sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from cft_jax.data.batch import TargetBatch
from cft_jax.text.trie import Forest, Trie


@dataclass(frozen=True, eq=False)
class Rows:
    """R rows before padding, with N prefixes and K target entries in all.

    Attributes:
      prompts: token ids of each row's prompt.
      node_starts: int64[R + 1]; the prefixes of row r are node_starts[r] to node_starts[r + 1], depth-first, the empty
        prefix first.
      token: last token of the prefix; -1 for the empty one.
      depth: its number of tokens.
      end: one past the last prefix below it, counted from the row's first.
      weight: of its step; 0 where the step is not counted.
      target_starts: int64[N + 1]; where the entries of each prefix begin.
      target_ids, target_probs: tokens that can follow the prefix and their probabilities.
      row_weight: what each row counts in the mean.
      task: which of the tasks that rows were asked for each row belongs to, ascending.
    """

    prompts: Sequence[Int32[np.ndarray, "_"]]
    node_starts: Int64[np.ndarray, "_"]
    token: Int32[np.ndarray, "N"]
    depth: Int32[np.ndarray, "N"]
    end: Int64[np.ndarray, "N"]
    weight: Float64[np.ndarray, "N"]
    target_starts: Int64[np.ndarray, "_"]
    target_ids: Int32[np.ndarray, "K"]
    target_probs: Float64[np.ndarray, "K"]
    row_weight: Float64[np.ndarray, "R"]
    task: Int64[np.ndarray, "R"]

    def __len__(self) -> int:
        return self.row_weight.size

    def sizes(self) -> Int64[np.ndarray, "R 3"]:
        """Tokens, steps and target entries of each row."""
        prompt_lengths = np.array([prompt.size for prompt in self.prompts], dtype=np.int64)
        counted = self.weight > 0
        num_targets = np.where(counted, np.diff(self.target_starts), 0)
        sums = np.zeros((2, self.token.size + 1), dtype=np.int64)
        np.cumsum(counted, out=sums[0, 1:])
        np.cumsum(num_targets, out=sums[1, 1:])
        steps, targets = np.diff(sums[:, self.node_starts], axis=1)
        return np.stack([prompt_lengths + np.diff(self.node_starts) - 1, steps, targets], axis=1)


def rows_of_strings(
    forest: Forest,
    prompts: Sequence[Int32[np.ndarray, "_"]],
    tries: Int64[np.ndarray, "R"],
    string_row: Int64[np.ndarray, "S"],
    strings: Int64[np.ndarray, "S"],
    weights: Float64[np.ndarray, "S"],
    row_weight: Float64[np.ndarray, "R"],
    *,
    per_step: bool,
) -> Rows:
    """Rows that hold the prefixes of given strings, each prefix once.

    Args:
      forest: tries that hold the strings.
      prompts: of each row.
      tries: which trie each row's strings belong to.
      string_row: the row of each string; every row needs one.
      strings: number of each string in its output space; a string may occur several times.
      weights: of each string, positive.
      row_weight: what each row counts in the mean.
      per_step: whether a string's weight is divided among its steps (mean over steps) or given to each.
    """
    arrays = forest.arrays
    trie = tries[string_row]
    first_prefix = forest.prefix_starts[trie]
    prefix = arrays["leaf_prefix"][forest.leaf_starts[trie] + strings].astype(np.int64)
    num_steps = arrays["depth"][first_prefix + prefix].astype(np.int64) + 1
    step_weight = weights / num_steps if per_step else weights
    # The prefixes of all strings, from the whole string up, as keys that sort by row and depth-first within it.
    stride = np.int64(int(np.diff(forest.prefix_starts).max()) + 1)
    keys, key_weights = [], []
    active = np.arange(strings.size)
    while active.size:
        keys.append(string_row[active] * stride + prefix[active])
        key_weights.append(step_weight[active])
        active = active[prefix[active] > 0]
        prefix[active] = arrays["parent"][first_prefix[active] + prefix[active]]
    kept, which = np.unique(np.concatenate(keys), return_inverse=True)
    weight = np.bincount(which, weights=np.concatenate(key_weights), minlength=kept.size)

    row, local = np.divmod(kept, stride)
    node_starts = np.searchsorted(row, np.arange(tries.size + 1)).astype(np.int64)
    source = forest.prefix_starts[tries[row]] + local
    end = np.searchsorted(kept, row * stride + arrays["subtree_end"][source]) - node_starts[row]
    # Offsets of children have one entry more per trie than there are prefixes.
    offset = source + tries[row]
    child_base = forest.child_starts[tries[row]]
    first_child = child_base + arrays["child_offsets"][offset]
    num_children = arrays["child_offsets"][offset + 1] - arrays["child_offsets"][offset]
    entries = _ranges(first_child, num_children)
    return Rows(
        prompts=prompts,
        node_starts=node_starts,
        token=arrays["token"][source],
        depth=arrays["depth"][source],
        end=end.astype(np.int64),
        weight=weight,
        target_starts=np.append(0, num_children.cumsum()),
        target_ids=arrays["child_ids"][entries],
        target_probs=arrays["child_probs"][entries],
        row_weight=row_weight,
        task=np.arange(tries.size),
    )


def rows_of_tries(
    tries: Sequence[Trie],
    prompts: Sequence[Int32[np.ndarray, "_"]],
    weights: Sequence[Float64[np.ndarray, "_"]],
    row_weight: Float64[np.ndarray, "R"],
) -> Rows:
    """A row per trie with all its prefixes and a given weight for each prefix's step."""
    sizes = [trie.num_prefixes for trie in tries]
    num_children = np.concatenate([np.diff(trie.child_offsets) for trie in tries])
    return Rows(
        prompts=prompts,
        node_starts=np.append(0, np.cumsum(sizes)),
        token=np.concatenate([trie.token for trie in tries]),
        depth=np.concatenate([trie.depth for trie in tries]),
        end=np.concatenate([trie.subtree_end for trie in tries]).astype(np.int64),
        weight=np.concatenate(weights),
        target_starts=np.append(0, num_children.cumsum()),
        target_ids=np.concatenate([trie.child_ids for trie in tries]),
        target_probs=np.concatenate([trie.child_probs for trie in tries]),
        row_weight=row_weight,
        task=np.arange(row_weight.size),
    )


def joined_rows(parts: Sequence[Rows], tasks: Sequence[Int64[np.ndarray, "_"]]) -> Rows:
    """The rows of several sources as one, in the order of their tasks.

    Args:
      parts: the rows of each source.
      tasks: for each source, the numbers that its tasks have among all.
    """
    names = ("token", "depth", "end", "weight", "target_ids", "target_probs", "row_weight")
    joined = Rows(
        prompts=[prompt for part in parts for prompt in part.prompts],
        node_starts=np.append(0, np.cumsum(np.concatenate([np.diff(part.node_starts) for part in parts]))),
        target_starts=np.append(0, np.cumsum(np.concatenate([np.diff(part.target_starts) for part in parts]))),
        task=np.concatenate([numbers[part.task] for part, numbers in zip(parts, tasks, strict=True)]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )
    order = np.argsort(joined.task, kind="stable")
    num_nodes = np.diff(joined.node_starts)[order]
    nodes = _ranges(joined.node_starts[order], num_nodes)
    return _gathered(joined, order, num_nodes, nodes, joined.end[nodes], None, joined.row_weight[order])


def split_rows(rows: Rows, max_nodes: int) -> Rows:
    """Rows of at most `max_nodes` prefixes beside the empty one; longer rows become several over the same prompt.

    Each part continues the row where the part before stopped and repeats the ancestors of its first prefix, whose
    steps, like the empty prefix's, are counted in the part that has them first. Only a row's first part has its weight
    in the mean, so sums over rows stay the same.

    Raises:
      ValueError: `max_nodes` is not larger than the longest string.
    """
    longest = int(rows.depth.max(initial=0))
    if max_nodes <= longest:
        raise ValueError(f"max_nodes={max_nodes} must be greater than {longest}, the tokens of the longest string")
    parts = [part for row in range(len(rows)) for part in _parts(rows, row, max_nodes)]
    return _gathered(
        rows,
        np.array([part.row for part in parts]),
        np.array([part.nodes.size for part in parts]),
        np.concatenate([part.nodes for part in parts]),
        np.concatenate([part.end for part in parts]),
        np.concatenate([part.counted for part in parts]),
        np.array([rows.row_weight[part.row] if part.is_first else 0.0 for part in parts]),
    )


def _gathered(
    rows: Rows,
    source: np.ndarray,
    num_nodes: np.ndarray,
    nodes: np.ndarray,
    end: np.ndarray,
    counted: np.ndarray | None,
    row_weight: np.ndarray,
) -> Rows:
    """Rows made of prefixes of others: of row `source[i]` the next `num_nodes[i]` of `nodes`, with new ends.

    Prefixes that are not `counted` lose their weight and their targets.
    """
    counted = np.ones(nodes.size, dtype=bool) if counted is None else counted
    num_targets = np.where(counted, np.diff(rows.target_starts)[nodes], 0)
    entries = _ranges(rows.target_starts[nodes], num_targets)
    return Rows(
        prompts=[rows.prompts[row] for row in source.tolist()],
        node_starts=np.append(0, num_nodes.cumsum()),
        token=rows.token[nodes],
        depth=rows.depth[nodes],
        end=end,
        weight=np.where(counted, rows.weight[nodes], 0.0),
        target_starts=np.append(0, num_targets.cumsum()),
        target_ids=rows.target_ids[entries],
        target_probs=rows.target_probs[entries],
        row_weight=row_weight,
        task=rows.task[source],
    )


def collate(
    rows: Rows, first: int, last: int, *, num_rows: int, shape: tuple[int, int, int], epsilon: float | None
) -> TargetBatch:
    """Pads rows `first` to `last` to one shape.

    Args:
      rows: the rows.
      first: the first row to take.
      last: one past the last.
      num_rows: B; rows beyond `last - first` are padding.
      shape: T, P and K, none smaller than any row needs.
      epsilon: floor of the target probabilities of a step before they are divided by their sum; None leaves them.
    """
    length, num_steps, num_targets = shape
    starts = rows.node_starts[first : last + 1]
    nodes = slice(int(starts[0]), int(starts[-1]))
    num_nodes = np.diff(starts)
    row = np.repeat(np.arange(last - first), num_nodes)
    prompts = rows.prompts[first:last]
    last_of_prompt = np.array([prompt.size - 1 for prompt in prompts], dtype=np.int64)
    place = last_of_prompt[row] + _rank(row, num_nodes)

    tokens, positions, until = np.zeros((3, num_rows, length), dtype=np.int32)
    columns = np.arange(length, dtype=np.int32)
    real, in_prompt = slice(0, last - first), columns <= last_of_prompt[:, None]
    if prompts:
        tokens[real][in_prompt] = np.concatenate(prompts)
    positions[real] = np.where(in_prompt, columns, 0)
    until[real] = np.where(in_prompt, (last_of_prompt + num_nodes)[:, None], 0)
    below = np.flatnonzero(rows.depth[nodes] > 0)
    where = row[below], place[below]
    tokens[where] = rows.token[nodes][below]
    positions[where] = last_of_prompt[where[0]] + rows.depth[nodes][below]
    until[where] = last_of_prompt[where[0]] + rows.end[nodes][below]

    counted = np.flatnonzero(rows.weight[nodes] > 0)
    where = row[counted], _rank(row[counted], np.bincount(row[counted], minlength=last - first))
    step_index = np.zeros((num_rows, num_steps), dtype=np.int32)
    step_weight = np.zeros((num_rows, num_steps), dtype=np.float32)
    step_index[where] = place[counted]
    step_weight[where] = rows.weight[nodes][counted]
    row_weight = np.zeros(num_rows, dtype=np.float32)
    row_weight[real] = rows.row_weight[first:last]
    targets = _collate_targets(rows, nodes.start + counted, *where, num_rows, num_steps, num_targets, epsilon)
    return TargetBatch(tokens, positions, until, step_index, step_weight, *targets, row_weight)


def _collate_targets(
    rows: Rows,
    nodes: np.ndarray,
    row: np.ndarray,
    step: np.ndarray,
    num_rows: int,
    num_steps: int,
    num_targets: int,
    epsilon: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The target arrays of the steps at `nodes`, each the `step`-th of its row."""
    target_step = np.full((num_rows, num_targets), num_steps - 1, dtype=np.int32)
    target_ids = np.zeros((num_rows, num_targets), dtype=np.int32)
    target_probs = np.zeros((num_rows, num_targets), dtype=np.float32)
    if nodes.size:
        starts = rows.target_starts[nodes]
        counts = rows.target_starts[nodes + 1] - starts
        entries = _ranges(starts, counts)
        entry_row = np.repeat(row, counts)
        where = entry_row, _rank(entry_row, np.bincount(entry_row, minlength=num_rows))
        target_step[where] = np.repeat(step, counts)
        target_ids[where] = rows.target_ids[entries]
        probabilities = rows.target_probs[entries]
        if epsilon is not None:
            probabilities = np.maximum(probabilities, epsilon)
            sums = np.add.reduceat(probabilities, np.cumsum(counts) - counts)
            probabilities /= np.repeat(sums, counts)
        target_probs[where] = probabilities
    return target_step, target_ids, target_probs


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of a split row; `nodes` are numbers in the arrays of all rows, `end` counts from the part's first."""

    row: int
    nodes: np.ndarray
    end: np.ndarray
    counted: np.ndarray
    is_first: bool


def _parts(rows: Rows, row: int, max_nodes: int) -> list[_Part]:
    start, stop = rows.node_starts[row : row + 2].tolist()
    ends = rows.end[start:stop]
    parts = []
    first = 1
    while first == 1 or first < ends.size:
        # Without the empty prefix, whose place is the prompt's last token in every part.
        ancestors = 1 + np.flatnonzero(ends[1:first] > first)
        last = min(ends.size, first + max_nodes - ancestors.size)
        nodes = np.concatenate([[0], ancestors, np.arange(first, last)])
        # A repeated ancestor goes on to the end of its subtree or of the part, whichever comes first.
        end = 1 + ancestors.size + np.minimum(ends[nodes], last) - first
        is_first = first == 1
        parts.append(_Part(row, start + nodes, end, (nodes >= first) | is_first, is_first))
        first = max(last, 2)
    return parts


def _rank(groups: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many entries of the same group precede each entry; `groups` ascend from 0 and have these sizes."""
    return np.arange(groups.size) - (np.cumsum(sizes) - sizes)[groups]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + count - 1 of every pair, one after another."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
