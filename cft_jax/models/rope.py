"""Rotary position embeddings, with the frequency scalings of HF (modeling_rope_utils.py)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cft_jax.models.config import LinearScaling, Llama3Scaling, Rope, YarnScaling


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Float[np.ndarray, "half"], float]:
    """Angle per position of each pair of dimensions, and the factor on cos and sin.

    float32 arithmetic in HF's order of operations, so that angles at long positions agree with torch's. The power is
    rounded once, as torch's is up to a few elements; numpy's own float32 power is off by one bit in a fifth of them.

    Returns:
      float32 [H/2] in radians per position, and the amplitude (1 except for YaRN).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / wavelength
    match rope.scaling:
        case None:
            return inverse, 1.0
        case LinearScaling(factor=factor):
            return inverse / np.float32(factor), 1.0
        case Llama3Scaling() as scaling:
            return _llama3(inverse, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(wavelength, scaling, rope.theta), scaling.attention_factor


def _llama3(inverse: Float[np.ndarray, "h"], s: Llama3Scaling) -> Float[np.ndarray, "h"]:
    wavelength = np.float32(2 * math.pi) / inverse
    low, high = s.original_length / s.low_freq_factor, s.original_length / s.high_freq_factor
    smooth = (s.original_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    ramp = (1 - smooth) * inverse / s.factor + smooth * inverse
    scaled = np.where(wavelength > low, inverse / s.factor, np.where(wavelength < high, inverse, ramp))
    return scaled.astype(np.float32)


def _yarn(wavelength: Float[np.ndarray, "h"], s: YarnScaling, theta: float) -> Float[np.ndarray, "h"]:
    head_dim = 2 * len(wavelength)

    def dimension_of(rotations: float) -> float:
        """Dimension whose angle makes this many turns over the original length."""
        return head_dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(s.beta_fast), dimension_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    keep = np.float32(1) - ramp
    stretched, plain = np.float32(1) / (np.float32(s.factor) * wavelength), np.float32(1) / wavelength
    return stretched * (np.float32(1) - keep) + plain * keep


def cos_sin(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """float32 factors of `rotate`: the cosines twice, and the sines negative, then positive; amplitude included."""
    inverse, amplitude = inverse_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[..., None] * inverse[None, None]
    cos, sin = jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), in float32; returns the dtype of `x`."""
    wide = x.astype(jnp.float32)
    turned = jnp.roll(wide, x.shape[-1] // 2, axis=-1)
    return (wide * cos[:, :, None, :] + turned * sin[:, :, None, :]).astype(x.dtype)
