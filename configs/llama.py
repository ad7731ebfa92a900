"""Calibration fine-tuning of Llama 3.2 Instruct with the paper's settings.

    python -m cft_jax.main --config=configs/llama.py        # 1B
    python -m cft_jax.main --config=configs/llama.py:3b
    python -m cft_jax.main --config=configs/llama.py:1b-hard

The weights are gated: accept the licence on the hub and set HF_TOKEN, or give `--config.model.checkpoint` a directory
in HF format.
"""

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict, with_hard_targets

CHECKPOINTS = {"1b": "meta-llama/Llama-3.2-1B-Instruct", "3b": "meta-llama/Llama-3.2-3B-Instruct"}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: a size, `1b` (default) or `3b`, with `-hard` for hard targets."""
    size, _, target = (arg or "1b").partition("-")
    if size not in CHECKPOINTS or target not in ("", "soft", "hard"):
        raise ValueError(f"configs/llama.py takes {', '.join(CHECKPOINTS)}, each with -hard or without; it got {arg!r}")
    config = default_config_dict()
    config.model.checkpoint = CHECKPOINTS[size]
    return with_hard_targets(config) if target == "hard" else config
