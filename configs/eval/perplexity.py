"""The perplexity suite: how well the model predicts ordinary text, to see what calibration costs.

    hf download allenai/paloma --repo-type dataset --local-dir paloma
    python -m cft_jax.evaluate --config=configs/eval/perplexity.py --workdir=eval/base-ppl \
        --config.model.checkpoint=WHAT --config.suite.perplexity.data=paloma

Any directory of that layout will do: `<slice>/<split>/*.jsonl.gz`, rows with a field `text`. WHAT is a hub id, a
directory in HF format or the directory of a run.
"""

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: what to measure, as `model.checkpoint`."""
    config = default_config_dict()
    config.model.checkpoint = arg
    config.eval.suites = ("perplexity",)
    config.export.enabled = False
    return config
