"""Calibration fine-tuning of Gemma 3 (instruction-tuned) with the paper's settings.

    python -m cft_jax.main --config=configs/gemma3.py
    python -m cft_jax.main --config=configs/gemma3.py:4b
    python -m cft_jax.main --config=configs/gemma3.py:1b-hard

The weights are gated: accept the licence on the hub and set HF_TOKEN, or give `--config.model.checkpoint` a directory
in HF format. Of the multimodal checkpoints (4b and larger) the language model is trained.
"""

from ml_collections import ConfigDict

from cft_jax.config import paper_config_dict

CHECKPOINTS = {
    "1b": "google/gemma-3-1b-it",
    "4b": "google/gemma-3-4b-it",
    "12b": "google/gemma-3-12b-it",
    "27b": "google/gemma-3-27b-it",
}
# What one device of 16 GiB trains; weights of the others are cut over all devices.
SMALL = (
    "google/gemma-3-1b-it",
    "google/gemma-3-4b-it",
)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: a size, `1b` by default, with `-hard` behind it for hard targets."""
    config = paper_config_dict(CHECKPOINTS, arg)
    if config.model.checkpoint not in SMALL:
        config.mesh.data, config.mesh.fsdp = 1, -1
    return config
