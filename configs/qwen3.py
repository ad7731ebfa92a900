"""Calibration fine-tuning of Qwen3 with the paper's settings.

    python -m cft_jax.main --config=configs/qwen3.py
    python -m cft_jax.main --config=configs/qwen3.py:1.7b
    python -m cft_jax.main --config=configs/qwen3.py:0.6b-hard

The weights are open; thinking is switched off in the prompts.
"""

from ml_collections import ConfigDict

from cft_jax.config import paper_config_dict

CHECKPOINTS = {
    "0.6b": "Qwen/Qwen3-0.6B",
    "1.7b": "Qwen/Qwen3-1.7B",
    "4b": "Qwen/Qwen3-4B",
    "8b": "Qwen/Qwen3-8B",
    "14b": "Qwen/Qwen3-14B",
}
# What one device of 16 GiB trains; weights of the others are cut over all devices.
SMALL = (
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: a size, `0.6b` by default, with `-hard` behind it for hard targets."""
    config = paper_config_dict(CHECKPOINTS, arg)
    if config.model.checkpoint not in SMALL:
        config.mesh.data, config.mesh.fsdp = 1, -1
    return config
