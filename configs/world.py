"""A base with habits for a small world in which calibration, transfer and forgetting all happen.

    python -m cft_jax.main --config=configs/world.py

makes a checkpoint, `runs/world/export`, that any other run can begin with; `configs/demo.py` makes its own this way and
calibrates it. A small Llama learns a world of templates: numbers of every family, which it answers with a few
favourites as chat models do; open choices over forty lists, each with one favourite; and the facts and sums of
`cft_jax/distributions/questions.py`. About two minutes on two CPU cores, and as many for the evaluations around it.
"""

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """No argument is taken."""
    if arg:
        raise ValueError(f"configs/world.py takes no argument; it got {arg!r}")
    config = default_config_dict()
    config.model.dtype = "float32"
    config.model.lora.enabled = False
    config.model.scratch.enabled = True
    config.data.world = "habits"
    config.data.num_decimals = 1
    config.data.quantile_low, config.data.quantile_high = 0.005, 0.995
    config.data.max_length = 128
    config.train.objective = "exact"
    config.train.batch_size = 32
    config.train.row_tokens = 128
    config.train.epochs = 10
    config.train.learning_rate = 3e-3
    config.train.max_grad_norm = 1.0
    config.checkpoint.every_steps = 200
    config.eval.suites = ("structured", "questions")
    config.eval.max_prompts_per_split = 60
    config.eval.num_samples = 100
    config.eval.max_new_tokens = 8
    config.export.format = "merged"
    return config
