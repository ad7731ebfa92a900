"""Calibration fine-tuning of gpt-oss with the paper's settings.

    python -m cft_jax.main --config=configs/gpt_oss.py
    python -m cft_jax.main --config=configs/gpt_oss.py:20b-hard

The weights are open, in MXFP4; they are trained from their bfloat16 form (42 GB). Answers come in the final channel,
at low reasoning effort.
"""

from ml_collections import ConfigDict

from cft_jax.config import paper_config_dict

CHECKPOINTS = {
    "20b": "openai/gpt-oss-20b",
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: a size, `20b` by default, with `-hard` behind it for hard targets."""
    config = paper_config_dict(CHECKPOINTS, arg)
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
