"""Mistakes in how a server draws, as what they make of the probabilities of every step. Pure.

All of them keep the probability of leaving the trie, which depends on tokens that no trie lists, and change how the
rest is shared out among the children; so what they make still sums to 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cft_jax.serving.draws import Draws, Layout, StepProbs

# What of a step's probability stays as it is: tokens at the edge of a cut fall to either side by rounding.
_UNCUT = 3e-3
TEMPERATURES = tuple(np.exp([sign * x for x in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.9) for sign in (1, -1)]))
TOP_K = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 25, 30, 40, 50, 64, 80, 100, 128, 200)
TOP_P = tuple(np.round(np.arange(0.1, 0.996, 0.005), 3))
MIN_P = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
SETTINGS = {"temperature": TEMPERATURES, "top-k": TOP_K, "top-p": TOP_P, "min-p": MIN_P}
_NEWTON_STEPS = 40


@dataclass(frozen=True)
class Temperature:
    """A temperature by maximum likelihood, with its standard error."""

    value: float
    error: float


def applied(
    layout: Layout, probs: StepProbs, kind: str, setting: int | float, *, edge: StepProbs | None = None
) -> StepProbs:
    """The probabilities under a mistake: of `SETTINGS` the kind, and how much of it.

    The share of a cut that stays uncut is drawn from `edge`, by default from `probs`.
    """
    scores = probs.log_probs
    if kind == "temperature":
        return _shared_out(layout, probs, scores / setting)
    if kind == "top-k":
        order, rank = _ranked(layout, scores)
        kept = rank < setting
    elif kind == "top-p":
        # The fewest most probable tokens that have at least this probability together.
        order, _ = _ranked(layout, scores)
        masses = np.exp(scores[order])
        before = np.cumsum(masses) - masses
        kept = before - before[layout.starts][layout.prefix] < setting - 1e-9
    elif kind == "min-p":
        order = np.arange(scores.size)
        kept = scores >= np.log(setting) + np.maximum.reduceat(scores, layout.starts)[layout.prefix]
    else:
        raise ValueError(f"unknown mistake {kind!r}")
    cut, uncut = np.full(scores.size, -np.inf), (edge or probs).log_probs
    cut[order[kept]] = scores[order[kept]]
    return StepProbs(
        np.logaddexp(np.log1p(-_UNCUT) + _shared_out(layout, probs, cut).log_probs, np.log(_UNCUT) + uncut),
        probs.log_left,
    )


def unstopped(layout: Layout, probs: StepProbs) -> StepProbs:
    """Where the server knows no stop token: what would end after a value runs on."""
    ends = np.concatenate([trie.child_ids == trie.terminator_id for trie in layout.tries])
    ended = np.where(ends, probs.log_probs, -np.inf)
    left = np.logaddexp(probs.log_left, np.maximum.reduceat(ended, layout.starts) + np.log1p(-_UNCUT))
    return StepProbs(np.where(ends, probs.log_probs + np.log(_UNCUT), probs.log_probs), left)


def maximum_likelihood(draws: Draws, probs: StepProbs) -> Temperature:
    """The temperature under which the draws are most probable, as a power of the probabilities of every step.

    The log-likelihood is concave in the power, so that Newton's method, kept within bounds, finds it. The standard
    error is from the Fisher information; it is infinite where no step has two possible tokens.
    """
    layout, scores = draws.layout, probs.log_probs
    visits = layout.sums(draws.taken)
    log_power, information = 0.0, 0.0
    for _ in range(_NEWTON_STEPS):
        power = np.exp(log_power)
        shares = np.exp(_normalised(layout, power * scores))
        mean = layout.sums(shares * scores)
        slope = float(draws.taken @ scores - visits @ mean)
        information = float(visits @ layout.sums(shares * (scores - mean[layout.prefix]) ** 2))
        if information <= 0:
            break
        step = float(np.clip(slope / (information * power), -0.5, 0.5))
        log_power = float(np.clip(log_power + step, -4, 4))
        if abs(step) < 1e-6:
            break
    value = float(np.exp(-log_power))
    return Temperature(value, value**2 / np.sqrt(information) if information > 0 else np.inf)


def sampling_mistakes() -> Iterator[tuple[str, float]]:
    """Every kind with every setting."""
    for kind, settings in SETTINGS.items():
        yield from ((kind, float(setting)) for setting in settings)


def _ranked(layout: Layout, scores: Float[np.ndarray, "C"]) -> tuple[np.ndarray, np.ndarray]:
    """Children by prefix and then by falling probability, and each one's rank after its prefix."""
    order = np.lexsort((-scores, layout.prefix))
    return order, np.arange(scores.size) - layout.starts[layout.prefix]


def _normalised(layout: Layout, scores: Float[np.ndarray, "C"]) -> Float[np.ndarray, "C"]:
    """Log-softmax over the children of every prefix."""
    most = np.maximum.reduceat(scores, layout.starts)[layout.prefix]
    return scores - most - np.log(layout.sums(np.exp(scores - most)))[layout.prefix]


def _shared_out(layout: Layout, probs: StepProbs, scores: Float[np.ndarray, "C"]) -> StepProbs:
    """The probability of staying on the trie, shared out in proportion to exp(scores)."""
    staying = np.log1p(-np.exp(probs.log_left))[layout.prefix]
    return StepProbs(_normalised(layout, scores) + staying, probs.log_left)
