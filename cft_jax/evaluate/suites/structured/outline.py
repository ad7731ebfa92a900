"""What a page shows of any prompt, in a kilobyte: its distributions in outline, and where the model goes wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cft_jax.text.trie import Trie

# Values of an outline, or the bins that stand for more of them; and the share of the target that these leave out on
# each side.
MAX_BARS = 40
TAIL = 0.002
_MAX_WRONG, _LEAST_WRONG = 5, 5e-4
_LONGEST_VALUE = 40


def outline(
    values: Sequence[str] | None,
    numbers: Float[np.ndarray, "C"] | None,
    target: Float[np.ndarray, "C"],
    model: Float[np.ndarray, "C"],
) -> dict[str, Any]:
    """Masses of the target and of the model, of three significant digits.

    Args:
      values: the answers; None where there are cells of them.
      numbers: what they are as numbers; None where they are none.
      target: their probabilities.
      model: what the model makes of them.

    Returns:
      `target` and `model`, and what they are of: `values`, of few numbers in their order, of texts the most probable;
      or `range`, the ends of bins of equal width.
    """
    if values is not None and (numbers is None or len(values) <= MAX_BARS):
        order = np.argsort(numbers if numbers is not None else -target, kind="stable")[:MAX_BARS]
        shown = {"values": [values[i][:_LONGEST_VALUE] for i in order]}
        return shown | {"target": _rounded(target[order]), "model": _rounded(model[order])}
    assert numbers is not None
    edges, masses = binned(numbers, target, model, MAX_BARS)
    return {"range": _rounded(edges[[0, -1]], 6), "target": _rounded(masses[0]), "model": _rounded(masses[1])}


def binned(
    numbers: Float[np.ndarray, "C"], target: Float[np.ndarray, "C"], model: Float[np.ndarray, "C"], most: int
) -> tuple[Float[np.ndarray, "_"], tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]]:
    """Edges of at most so many bins of equal width around the middle of the target, and both masses in them."""
    order = np.argsort(numbers)
    cumulative = np.cumsum(target[order])
    low, high = numbers[order][np.minimum(np.searchsorted(cumulative, [TAIL, 1 - TAIL]), numbers.size - 1)]
    bins, within = most if high > low else 1, (float(low), float(high))
    own = numbers[order][(numbers[order] >= low) & (numbers[order] <= high)]
    if own.size > 1 and np.ptp(np.diff(own)) < 1e-6 * (high - low):
        # Evenly spaced values, as many in every bin but the last: bins of other widths would draw a comb.
        step, each = (high - low) / (own.size - 1), -(-own.size // most)
        bins = -(-own.size // each)
        within = (float(low - step / 2), float(low - step / 2 + bins * each * step))
    shown, edges = np.histogram(numbers, bins, within, weights=target)
    answered, _ = np.histogram(numbers, bins, within, weights=model)
    return edges, (shown, answered)


def wrong_prefixes(
    trie: Trie, child_log_probs: Float[np.ndarray, "K"], text_of: Callable[[Sequence[int]], str]
) -> list[list[Any]]:
    """The prefixes after which the model goes most wrong, as often as the target comes there.

    Args:
      trie: of the prompt's values.
      child_log_probs: of the model, as `trie.child_ids`.
      text_of: the text of tokens.

    Returns:
      By falling total variation of the next token times the target's probability of the prefix: the prefix, its child
      that is most wrong ("" for the end of the answer, None for what no value has there), the target's probability of
      that child after the prefix, and the model's.
    """
    model = np.exp(child_log_probs)
    gaps = np.abs(model - trie.child_probs)
    others = np.maximum(1 - np.add.reduceat(model, trie.child_offsets[:-1]), 0.0)
    variation = trie.reach * (np.add.reduceat(gaps, trie.child_offsets[:-1]) + others) / 2
    found: list[list[Any]] = []
    for prefix in np.argsort(-variation, kind="stable")[:_MAX_WRONG].tolist():
        if variation[prefix] < _LEAST_WRONG:
            break
        first, last = trie.child_offsets[prefix : prefix + 2].tolist()
        child = first + int(np.argmax(gaps[first:last]))
        token = int(trie.child_ids[child])
        text = "" if token == trie.terminator_id else text_of([token])
        wrong, shares = text, (trie.child_probs[child], model[child])
        if others[prefix] > gaps[child]:
            wrong, shares = None, (0.0, others[prefix])
        found.append([text_of(_tokens(trie, prefix)), wrong, *_rounded(np.array(shares))])
    return found


def _tokens(trie: Trie, prefix: int) -> list[int]:
    tokens = []
    while prefix > 0:
        tokens.append(int(trie.token[prefix]))
        prefix = int(trie.parent[prefix])
    return tokens[::-1]


def _rounded(values: Float[np.ndarray, "N"], digits: int = 3) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]
