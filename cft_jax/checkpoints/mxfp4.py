"""MXFP4 tensors (4-bit values in blocks of 32 with a shared power of two), read as the bfloat16 they stand for.

The values are those of transformers' `dequantize` (integrations/mxfp4.py): code times 2^(scale - 127), exact in
bfloat16 but for the ends of its range.
"""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8, UInt32

from cft_jax.checkpoints.tensor_files import StoredTensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CODES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float64)
_VALUES = np.concatenate([_CODES, -_CODES])


def _table() -> UInt32[np.ndarray, "65536"]:
    """Both bfloat16 values of a byte under a scale, as one word at 256*scale + byte; the low four bits come first."""
    pairs = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)
    values = pairs * 2.0 ** (np.arange(256, dtype=np.float64)[:, None, None] - 127)
    with np.errstate(over="ignore"):  # the largest are infinite, as in torch
        return values.astype(_BFLOAT16).view(np.uint32).reshape(-1)


_TABLE = _table()


def dequantize(blocks: UInt8[np.ndarray, "*R G B"], scales: UInt8[np.ndarray, "*R G"]) -> Shaped[np.ndarray, "*R C"]:
    """Values of blocks of two 4-bit codes per byte, C = 2*G*B; bfloat16."""
    index = scales.astype(np.uint16)[..., None] * np.uint16(256) + blocks
    return _TABLE[index].view(_BFLOAT16).reshape(*blocks.shape[:-2], math.prod(blocks.shape[-2:]) * 2)


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

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Experts start:stop, by default all, dequantised one by one."""
        stop = self.shape[0] if stop is None else stop
        out = np.empty((stop - start, *self.shape[1:]), _BFLOAT16)
        for expert in range(start, stop):
            blocks, scales = self.blocks.read(expert, expert + 1), self.scales.read(expert, expert + 1)
            out[expert - start] = dequantize(blocks, scales)[0].T
        return out


# Tensors of a model, which are read by rows of their first axis.
Rows = StoredTensor | Mxfp4Tensor
