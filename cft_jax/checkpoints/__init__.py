"""Checkpoints in Hugging Face format and of our own: in, out, and what they weigh."""

from cft_jax.checkpoints.hf_export import save_pretrained
from cft_jax.checkpoints.hf_io import from_pretrained
from cft_jax.checkpoints.scratch import write_random_llama

__all__ = ["from_pretrained", "save_pretrained", "write_random_llama"]
