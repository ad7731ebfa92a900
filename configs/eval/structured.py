"""The structured-sampling suite: exact and sampled metrics of a model on the paper's test prompts.

    python -m cft_jax.evaluate --config=configs/eval/structured.py --workdir=eval/base --config.model.checkpoint=WHAT
    python -m cft_jax.evaluate --config=configs/eval/structured.py:runs/llama --workdir=eval/llama

WHAT is a hub id, a directory in HF format or the directory of a run. The paper's few prompts instead of all 683:
`--config.data.eval_prompt_selection=paper_selected`.
"""

from ml_collections import ConfigDict

from cft_jax.config import eval_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: the directory of a run, whose data settings are taken and whose newest checkpoint is measured."""
    return eval_config_dict(["structured"], arg)
