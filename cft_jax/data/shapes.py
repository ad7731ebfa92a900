"""The few shapes that batches are padded to, so that a run compiles its step only a few times."""

import numpy as np
from jaxtyping import Int64

Shape = tuple[int, int, int]

# Shares of the sampled steps that fit the levels.
_QUANTILES = (0.5, 0.9, 1.0)
# A level that saves less than this share of the tokens and steps of the next one is not worth a compilation.
_WORTHWHILE = 0.15
_MULTIPLES = np.array([8, 2, 64])


def shape_levels(sizes: Int64[np.ndarray, "N 3"]) -> tuple[Shape, ...]:
    """One to three shapes (tokens, steps, target entries) for steps that need these sizes.

    Args:
      sizes: of sampled steps, each the largest over the step's rows.

    Returns:
      Shapes of ascending size; the last fits all sampled steps.
    """
    levels: list[Shape] = []
    for quantile in sorted(_QUANTILES, reverse=True):
        shape = _rounded(np.quantile(sizes, quantile, axis=0, method="higher"))
        saving = 1 - max(shape[0] / levels[0][0], shape[1] / levels[0][1]) if levels else 1.0
        if saving > _WORTHWHILE:
            levels.insert(0, shape)
    return tuple(levels)


def fitting_shape(size: Int64[np.ndarray, "3"], levels: tuple[Shape, ...]) -> Shape:
    """The smallest level that fits; beyond the last, a size grows by quarters until it does."""
    for level in levels:
        if (size <= np.array(level)).all():
            return level
    top = np.array(levels[-1])
    growth = np.ceil(np.maximum(size / top - 1, 0) * 4) / 4
    return _rounded(top * (1 + growth))


def _rounded(size: np.ndarray) -> Shape:
    tokens, steps, targets = (np.ceil(np.maximum(size, 1) / _MULTIPLES) * _MULTIPLES).astype(int).tolist()
    return tokens, steps, targets
