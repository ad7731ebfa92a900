"""Checkpoints in Hugging Face format and of our own: in, out, and what they weigh."""

from cft_jax.checkpoints.hf_export import save_pretrained
from cft_jax.checkpoints.hf_io import from_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
