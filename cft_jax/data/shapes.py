"""The few shapes that batches are padded to, so that a run compiles its step only a few times."""

import numpy as np
from jaxtyping import Int64

# Rows, tokens, steps and target entries.
Shape = tuple[int, int, int, int]

# Shares of the sampled steps that fit the levels.
_QUANTILES = (0.5, 0.9, 1.0)
# A level that saves less than this share of the tokens and steps of the next one is not worth a compilation.
_WORTHWHILE = 0.15


def shape_levels(sizes: Int64[np.ndarray, "N 4"], row_multiple: int) -> tuple[Shape, ...]:
    """One to three shapes for steps that need these sizes.

    Args:
      sizes: of sampled steps: rows, and the largest tokens, steps and target entries of any row.
      row_multiple: what the number of rows must be a multiple of.

    Returns:
      Shapes of ascending size; the last fits all sampled steps.
    """
    levels: list[Shape] = []
    for quantile in sorted(_QUANTILES, reverse=True):
        shape = _rounded(np.quantile(sizes, quantile, axis=0, method="higher"), row_multiple)
        if (
            not levels
            or 1 - shape[0] * max(shape[1] / levels[0][1], shape[2] / levels[0][2]) / levels[0][0] > _WORTHWHILE
        ):
            levels.insert(0, shape)
    return tuple(levels)


def fitting_shape(size: Int64[np.ndarray, "4"], levels: tuple[Shape, ...], row_multiple: int) -> Shape:
    """The smallest level that fits; beyond the last, a size grows by quarters until it does."""
    for level in levels:
        if (size <= np.array(level)).all():
            return level
    top = np.array(levels[-1])
    growth = np.ceil(np.maximum(size / top - 1, 0) * 4) / 4
    return _rounded(top * (1 + growth), row_multiple)


def _rounded(size: np.ndarray, row_multiple: int) -> Shape:
    multiples = np.array([row_multiple, 8, 2, 64])
    rows, tokens, steps, targets = (np.ceil(np.maximum(size, 1) / multiples) * multiples).astype(int).tolist()
    return rows, tokens, steps, targets
