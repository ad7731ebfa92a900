"""Metrics of the open-random suite: how many different answers, and how many next tokens hold the mass."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

TOP_P_THRESHOLDS = (0.01, *(round(0.05 * k, 2) for k in range(1, 20)), 0.99)
"""The paper's 21 thresholds: 0.01, 0.05, 0.10, ..., 0.95, 0.99."""


def open_random_counts(outputs: Sequence[str]) -> dict[str, float | int | dict[str, int]]:
    """Counts normalised answers to one prompt; empty ones are outputs but no answers.

    Returns:
      `num_outputs`; `num_unique` and `counts` over the non-empty answers; `entropy`, that of their empirical
      distribution in nats, absent without any; `unique_fraction`, `num_unique` over all outputs, 0 without any.
    """
    counts = Counter(output for output in outputs if output)
    metrics: dict[str, float | int | dict[str, int]] = {
        "num_outputs": len(outputs),
        "num_unique": len(counts),
        "unique_fraction": len(counts) / max(len(outputs), 1),
        "counts": dict(counts),
    }
    if counts:
        total = counts.total()
        metrics["entropy"] = -math.fsum(count / total * math.log(count / total) for count in counts.values())
    return metrics


def top_p_sizes(probs: Float[np.ndarray, "V"], thresholds: Sequence[float]) -> Int[np.ndarray, "P"]:
    """For every threshold p the smallest k such that the k largest probabilities sum to at least p; V if they never do.

    Sums are float64 and sequential, largest first: in bfloat16 the sizes come out up to a quarter too small.
    """
    cumulative = np.cumsum(np.sort(probs.astype(np.float64))[::-1])
    sizes = np.searchsorted(cumulative, np.asarray(thresholds, np.float64), side="left") + 1
    return np.minimum(sizes, len(probs))
