"""MXFP4 tensors (4-bit values in blocks of 32 with a shared power of two), read as the bfloat16 they stand for.

The values are those of transformers' `dequantize` (integrations/mxfp4.py): code times 2^(scale - 127), exact in
bfloat16 but for the ends of its range.
"""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float32, UInt8

from cft_jax.checkpoints.tensor_files import StoredTensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CODES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_CODES, -_CODES])
# Both values of every byte: the low four bits come first.
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)
_SCALES = np.concatenate([2.0 ** np.arange(-127, 128, dtype=np.float64), [np.inf]]).astype(np.float32)


def dequantize(blocks: UInt8[np.ndarray, "*R G B"], scales: UInt8[np.ndarray, "*R G"]) -> Float32[np.ndarray, "*R C"]:
    """Values of blocks of two 4-bit codes per byte, C = 2*G*B; float32."""
    values = _PAIRS[blocks]
    with np.errstate(invalid="ignore"):  # scale 255 stands for infinity, whose product with 0 is NaN as in torch
        values *= _SCALES[scales][..., None, None]
    return values.reshape(*blocks.shape[:-2], math.prod(blocks.shape[-2:]) * 2)


@dataclass(frozen=True)
class Mxfp4Tensor:
    """A matrix per expert, [E, in, out] in bfloat16, stored as `blocks` [E, out, in/32, 16] and `scales`."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, groups, width = self.blocks.shape
        return (experts, groups * width * 2, out)

    @property
    def dtype(self) -> np.dtype:
        return _BFLOAT16

    def read(self, start: int, stop: int) -> np.ndarray:
        """Experts start:stop, dequantised one by one."""
        out = np.empty((stop - start, *self.shape[1:]), _BFLOAT16)
        for expert in range(start, stop):
            blocks, scales = self.blocks.read(expert, expert + 1), self.scales.read(expert, expert + 1)
            out[expert - start] = dequantize(blocks, scales)[0].T.astype(_BFLOAT16)
        return out
