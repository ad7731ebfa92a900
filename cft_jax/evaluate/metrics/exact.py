"""Metrics of the model's whole distribution over an output space, computed from log-probabilities, without sampling.

Throughout p are the target's probabilities and q the model's probabilities of the same strings, terminator included
and not renormalised: what the model puts elsewhere is missing from their sum.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cft_jax.distributions.parse import parse_number

CALIBRATION_BINS = 20


def exact_figures(
    target: Float[np.ndarray, "N"], log_probs: Float[np.ndarray, "N"], values: Sequence[str]
) -> dict[str, float]:
    """Distances between the target p, summing to 1, and the model's distribution ln q of the same strings.

    Returns:
      `kl`: sum of p ln(p/q), from the target to the model, in nats;
      `total_variation`: half of sum |p - q| + 1 - sum q, in [0, 1];
      `support_mass`: sum q;
      `wasserstein_1`: between p and q / sum q on the number line, in the units of the values; absent unless every
        value is a finite number, or when q is 0 everywhere.
    """
    return distances(target, log_probs, as_numbers(values))


def distances(
    target: Float[np.ndarray, "N"], log_probs: Float[np.ndarray, "N"], numbers: Float[np.ndarray, "N"] | None
) -> dict[str, float]:
    """`exact_figures` of values that stand for these numbers, or of values that are no numbers (None)."""
    model = np.exp(log_probs)
    mass = float(model.sum())
    positive = target > 0
    metrics = {
        "kl": float(np.sum(target[positive] * (np.log(target[positive]) - log_probs[positive]))),
        "total_variation": 0.5 * (float(np.abs(target - model).sum()) + max(1.0 - mass, 0.0)),
        "support_mass": mass,
    }
    if numbers is not None and mass > 0:
        metrics["wasserstein_1"] = wasserstein_on_line(numbers, target, model / mass)
    return metrics


def as_numbers(values: Sequence[str]) -> Float[np.ndarray, "N"] | None:
    """The numbers the strings stand for; None unless every one is a finite number."""
    parsed = [parse_number(value).value for value in values]
    numbers = np.array([math.nan if value is None else value for value in parsed], np.float64)
    return numbers if np.isfinite(numbers).all() else None


def wasserstein_on_line(numbers: Float[np.ndarray, "N"], p: Float[np.ndarray, "N"], q: Float[np.ndarray, "N"]) -> float:
    """Wasserstein-1 distance of two distributions on the same numbers: the area between their CDFs."""
    order = np.argsort(numbers, kind="stable")
    difference = np.cumsum(p[order] - q[order])[:-1]
    return float(np.abs(difference) @ np.diff(numbers[order]))


def calibration_bins(
    target: Float[np.ndarray, "N"], log_probs: Float[np.ndarray, "N"], numbers: Float[np.ndarray, "N"] | None
) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
    """Target mass and model mass in 20 bins between the target's quantiles.

    The bins hold equal target mass. A value that reaches over several bins is shared out in proportion (the
    non-randomised probability integral transform of Czado, Gneiting and Held, Biometrics 65, 2009), so that a model
    equal to its target has the target's mass in every bin, for discrete targets too. `numbers` order the values, which
    without them are in the order of the output space.

    Returns:
      The target's masses, all 1/20, and the model's, which sum to its support mass.
    """
    order = np.arange(target.size) if numbers is None else np.argsort(numbers, kind="stable")
    p, q = target[order], np.exp(log_probs[order])
    upper = np.minimum(np.cumsum(p), 1.0)
    upper[-1] = 1.0
    # The model's mass below the target's quantile u is linear in u across each value. Values without target mass are
    # steps in it: the last of equal abscissae counts, and the first edge lies before any step.
    level, last = np.unique(upper[::-1], return_index=True)
    below = np.cumsum(q)[upper.size - 1 - last]
    edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
    inner = np.interp(edges, np.concatenate([[0.0], level]), np.concatenate([[0.0], below]))
    inner[0] = 0.0
    return np.full(CALIBRATION_BINS, 1.0 / CALIBRATION_BINS), np.diff(inner)
