"""The questions that are not about chance: sums, capitals, spelling, texts; does the model still know them?

    python -m cft_jax.evaluate --config=configs/eval/questions.py --workdir=eval/base --config.model.checkpoint=WHAT

WHAT is a hub id, a directory in HF format or the directory of a run. Nothing is downloaded beside it.
"""

from ml_collections import ConfigDict

from cft_jax.config import eval_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: the directory of a run, whose chat options are taken and whose newest checkpoint is measured."""
    return eval_config_dict(["questions"], arg)
