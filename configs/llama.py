"""Calibration fine-tuning of Llama 3.2 Instruct with the paper's settings.

    python -m cft_jax.main --config=configs/llama.py
    python -m cft_jax.main --config=configs/llama.py:3b
    python -m cft_jax.main --config=configs/llama.py:1b-hard

The weights are gated: accept the licence on the hub and set HF_TOKEN, or give `--config.model.checkpoint` a directory
in HF format. One device with 16 GiB trains either.
"""

from ml_collections import ConfigDict

from cft_jax.config import paper_config_dict

CHECKPOINTS = {
    "1b": "meta-llama/Llama-3.2-1B-Instruct",
    "3b": "meta-llama/Llama-3.2-3B-Instruct",
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: a size, `1b` by default, with `-hard` behind it for hard targets."""
    return paper_config_dict(CHECKPOINTS, arg)
