"""The NoveltyBench suite: ten answers to each prompt; how many are different, and how good are they?

    python -m cft_jax.evaluate --config=configs/eval/noveltybench.py --workdir=eval/base --config.model.checkpoint=WHAT

WHAT is a hub id, a directory in HF format or the directory of a run. Prompts come from the hub's data set or from
`--config.suite.noveltybench.data=FILE.jsonl` (rows with id and prompt). The three stages generate, partition and score
can run one by one, `--config.suite.noveltybench.stages=partition`; without generate no model is loaded, so that the
judges (DeBERTa, and a reward model of 27 billion parameters) have the device to themselves. They need
`pip install -e ".[eval]"`.
"""

from ml_collections import ConfigDict

from cft_jax.config import eval_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: the directory of a run, whose chat options are taken and whose newest checkpoint is measured."""
    config = eval_config_dict(["noveltybench"], arg)
    # A suite alone takes its number from eval.num_samples.
    config.eval.num_samples, config.suite.noveltybench.num_samples = 10, 0
    return config
