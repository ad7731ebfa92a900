"""The open-random suite: 100 answers to each of 143 requests for a random word, city, name and so on.

    python -m cft_jax.evaluate --config=configs/eval/open_random.py --workdir=eval/base --config.model.checkpoint=WHAT

WHAT is a hub id, a directory in HF format or the directory of a run. Other prompts, a JSON list of texts:
`--config.suite.open_random.prompts=FILE.json`. String Seed of Thought: `--config.eval.method=ssot`.
"""

from ml_collections import ConfigDict

from cft_jax.config import eval_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: the directory of a run, whose chat options are taken and whose newest checkpoint is measured."""
    config = eval_config_dict(["open_random"], arg)
    # A suite alone takes its number from eval.num_samples.
    config.eval.num_samples, config.suite.open_random.num_samples = 100, 0
    return config
