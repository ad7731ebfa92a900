"""A small random model as a checkpoint in HF format, without torch: what training from scratch starts from."""

from pathlib import Path

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from cft_jax.checkpoints import hf_names
from cft_jax.checkpoints.directories import new_directory
from cft_jax.checkpoints.lora_weights import HostWeights
from cft_jax.checkpoints.tensor_files import WEIGHTS, write_record, write_tensors
from cft_jax.models.config import ModelConfig
from cft_jax.models.families import llama_to_hf
from cft_jax.models.transformer import Transformer


def write_random_llama(
    directory: Path, *, config: ModelConfig, seed: int, dtype: DTypeLike, eos_token_id: int, max_length: int
) -> None:
    """Writes config.json and model.safetensors of a LlamaForCausalLM with random weights.

    Args:
      directory: absent or empty.
      config: of a model that Llama can express.
      seed: of the weights.
      dtype: of the file.
      eos_token_id: at which generation stops.
      max_length: positions that config.json promises.

    Raises:
      UserError: the directory is taken.
      ValueError: Llama cannot express the config.
    """
    raw = llama_to_hf(config)
    raw |= {"dtype": np.dtype(dtype).name, "eos_token_id": eos_token_id, "max_position_embeddings": max_length}
    weights = HostWeights(Transformer(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(seed)))
    tensors = {name.hf: weights.base(name) for name in hf_names.tensor_names(config)}
    with new_directory(directory) as out:
        write_record(out / "config.json", raw)
        write_tensors(out / WEIGHTS, tensors, tensors.values())
