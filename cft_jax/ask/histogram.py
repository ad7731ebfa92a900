"""Answers as a table for the terminal: how often each was drawn, beside what the model and the target say."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from cft_jax.ask.questions import Exact
from cft_jax.distributions.parse import parse_number
from cft_jax.evaluate.metrics.exact import as_numbers
from cft_jax.evaluate.metrics.sound import pooled_chi_square

# Rows of a table, and the share of the answers that its bins leave out on each side.
_ROWS = 24
_BINS = 20
_TAIL = 0.002
_BAR = 24
_REST = "other answers"


def table(samples: Sequence[str], exact: Exact | None) -> list[str]:
    """The lines of a table: a row per answer or, of many numbers, per bin."""
    if exact is None:
        return _of_samples(samples)
    numbers = as_numbers(exact.values)
    if exact.is_listed and len(exact.values) <= _ROWS:
        names, groups = list(exact.values), np.arange(len(exact.values))
    elif numbers is not None:
        names, groups = _bins(numbers, exact.model if exact.target is None else exact.target)
    else:
        order = np.argsort(-exact.model, kind="stable")[:_ROWS]
        names, groups = [exact.values[i] for i in order], np.full(len(exact.values), len(order))
        groups[order] = np.arange(len(order))
    rows = len(names)
    drawn = np.bincount(_group_of(samples, exact, groups, rest=rows), minlength=rows + 1)
    columns = {"exact": np.bincount(groups, exact.model, minlength=rows + 1)}
    columns["exact"][rows] += max(1 - float(exact.model.sum()), 0.0)
    if exact.target is not None:
        columns["target"] = np.bincount(groups, exact.target, minlength=rows + 1)
    return _lines([*names, _REST], drawn, columns)


def chi_square_pvalue(samples: Sequence[str], exact: Exact) -> float | None:
    """Of the draws against the model's own probabilities; None where the answers are not listed or too few."""
    if not exact.is_listed:
        return None
    drawn = Counter(samples)
    counts = np.array([drawn[value] for value in exact.values], np.float64)
    rest = max(1 - float(exact.model.sum()), 0.0)
    found = pooled_chi_square(np.append(counts, len(samples) - counts.sum()), np.append(exact.model, rest))
    return None if found is None else found[1]


def _of_samples(samples: Sequence[str]) -> list[str]:
    """Without anything else known: the most frequent answers, or bins of many different numbers."""
    counts = Counter(samples)
    numbers = as_numbers(list(counts))
    if numbers is not None and len(counts) > _ROWS:
        weights = np.array(list(counts.values())) / len(samples)
        names, groups = _bins(numbers, weights)
        drawn = np.bincount(groups, list(counts.values()), minlength=len(names) + 1).astype(np.int64)
    else:
        common = counts.most_common(_ROWS)
        names = [value for value, _ in common]
        drawn = np.array([*(count for _, count in common), len(samples) - sum(count for _, count in common)])
    return _lines([*names, _REST], drawn, {})


def _bins(numbers: Float64[np.ndarray, "N"], weights: Float64[np.ndarray, "N"]) -> tuple[list[str], np.ndarray]:
    """Names of bins of equal width between far quantiles, and the bin of each number; those beyond are in the ends."""
    order = np.argsort(numbers, kind="stable")
    cumulative = np.cumsum(weights[order])
    cuts = np.searchsorted(cumulative, np.array([_TAIL, 1 - _TAIL]) * cumulative[-1])
    low, high = numbers[order][np.minimum(cuts, numbers.size - 1)]
    edges = np.linspace(low, high, _BINS + 1)
    groups = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, _BINS - 1)
    return [f"{start:.4g} to {stop:.4g}" for start, stop in itertools.pairwise(edges)], groups


def _group_of(samples: Sequence[str], exact: Exact, groups: np.ndarray, *, rest: int) -> np.ndarray:
    """The row of each sample; `rest` for what is no answer of the space."""
    by_value = dict(zip(exact.values, groups.tolist(), strict=True))
    if exact.is_listed:
        return np.array([by_value.get(sample, rest) for sample in samples], np.int64)
    middles = as_numbers(exact.values)
    assert middles is not None
    found = [parse_number(sample).value for sample in samples]
    nearest = [rest if value is None else int(groups[np.argmin(np.abs(middles - value))]) for value in found]
    return np.array(nearest, np.int64)


def _lines(names: Sequence[str], drawn: np.ndarray, columns: dict[str, np.ndarray]) -> list[str]:
    share = drawn / max(int(drawn.sum()), 1)
    largest = max(share.max(), *(column.max() for column in columns.values())) if columns else share.max()
    shown = [repr(name)[1:-1] if name is not _REST else name for name in names]
    width = max(map(len, shown))
    lines = [f"{'':{width}}  {'drawn':>7}  {'':{_BAR}}" + "".join(f"  {name:>7}" for name in columns)]
    for row, name in enumerate(shown):
        known = [column[row] for column in columns.values()]
        if name is _REST and not drawn[row] and max(known, default=0.0) < 5e-5:
            continue
        bar = "█" * round(_BAR * float(share[row]) / max(float(largest), 1e-12))
        lines.append(f"{name:{width}}  {share[row]:7.4f}  {bar:{_BAR}}" + "".join(f"  {value:7.4f}" for value in known))
    return lines
