"""Your own prompts and distributions: the worked example of docs/data.md, a minute on two cores.

    python -m cft_jax.main --config=configs/custom.py
    python -m cft_jax.main --config=configs/custom.py:mine.jsonl

`configs/custom.jsonl` has an evenly balanced A/B/C/D, a loaded die, a survey and more; a small, randomly initialised
model learns them. For a real model set `config.model.scratch.enabled=False`, `config.model.lora.enabled=True`,
`config.model.checkpoint=...` and `config.export.format=adapter`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: path of another JSONL file."""
    config = default_config_dict()
    config.data.custom = arg or str(Path(__file__).with_suffix(".jsonl"))
    config.data.num_decimals = 1
    config.model.dtype = "float32"
    config.model.lora.enabled = False
    config.model.scratch.enabled = True
    config.train.objective = "exact"
    config.train.batch_size = 16
    config.train.epochs = 150
    config.train.learning_rate = 3e-3
    config.train.max_grad_norm = 1.0
    config.checkpoint.every_steps = 50
    config.export.format = "merged"
    return config
