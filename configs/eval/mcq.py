"""The multiple-choice suite: the model writes 1,000 questions with options A to D; where does it put the answer?

    python -m cft_jax.evaluate --config=configs/eval/mcq.py --workdir=eval/base --config.model.checkpoint=WHAT

WHAT is a hub id, a directory in HF format or the directory of a run. Another prompt, a text file that asks for the same
seven lines: `--config.suite.mcq.prompt=FILE.txt`.
"""

from ml_collections import ConfigDict

from cft_jax.config import eval_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: the directory of a run, whose chat options are taken and whose newest checkpoint is measured."""
    config = eval_config_dict(["mcq"], arg)
    config.eval.num_samples, config.suite.mcq.num_samples = 1000, 0
    return config
