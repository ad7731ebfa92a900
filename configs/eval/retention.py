"""The retention suite: what a model still knows, by TinyBenchmarks and the paper's protocol (500 questions).

    curl -LO https://github.com/felipemaiapolo/tinyBenchmarks/raw/main/tinyBenchmarks/tinyBenchmarks.pkl
    python -m cft_jax.evaluate.suites.retention.convert_items --input=tinyBenchmarks.pkl --output=tinyBenchmarks.npz
    python -m cft_jax.evaluate --config=configs/eval/retention.py --workdir=eval/base-retention \
        --config.model.checkpoint=WHAT --config.suite.retention.item_parameters=tinyBenchmarks.npz

Without item parameters the gp-IRT estimates are absent. The data sets come from the hub, or from
`config.suite.retention.data`. Any tasks of EleutherAI's lm-eval instead: `--config.tasks=arc_easy,hellaswag`.
"""

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: what to measure, as `model.checkpoint`."""
    config = default_config_dict()
    config.model.checkpoint = arg
    config.eval.suites = ("retention",)
    config.export.enabled = False
    return config
