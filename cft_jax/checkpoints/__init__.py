"""Checkpoints in Hugging Face format and of our own: in, out, and what they weigh."""

from cft_jax.checkpoints.hf_export import save_pretrained as save_pretrained
from cft_jax.checkpoints.hf_io import from_pretrained as from_pretrained
from cft_jax.checkpoints.scratch import write_random_llama as write_random_llama
