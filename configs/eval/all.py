"""Every suite for one checkpoint, and one table of them all, in the paper's settings.

    python -m cft_jax.evaluate --config=configs/eval/all.py --workdir=eval/base --config.model.checkpoint=WHAT
    python -m cft_jax.evaluate --config=configs/eval/all.py:runs/llama --workdir=eval/soft
    python -m cft_jax.compare --output=comparison.html eval/base eval/soft eval/hard

Each suite has a directory of its own in --workdir. One that lacks its data or a scorer is named in the table with the
command that gets it, and the others run; the same command completes the table later. Local data:
`--config.suite.{perplexity.data=DIR, noveltybench.data=FILE.jsonl, retention.data=DIR}`.
"""

from ml_collections import ConfigDict

from cft_jax.config import eval_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: the directory of a run, whose data settings are taken and whose newest checkpoint is measured."""
    return eval_config_dict(["all"], arg)
