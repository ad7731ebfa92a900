"""A small world in which calibration, transfer and forgetting all happen: its base, and a calibration of that.

    python -m cft_jax.main --config=configs/world.py
    python -m cft_jax.main --config=configs/world.py:fair [--config.train.keep.weight=0.1]

The first run makes a base with habits in `runs/world/export`, which any other run can take as its checkpoint. A small
Llama learns a world of templates: numbers of every family, which it answers with a few favourites as chat models do;
open choices over forty lists, each with one favourite; and the facts and sums of
`cft_jax/distributions/questions.py`.

The second calibrates it with adapters, on some families and half of the lists. Its evaluations, before and after, have
all three sides: unseen parameters; families and lists that it was never trained on; and the questions that are not
about chance, of which `train.keep` keeps half of the prompts.
"""

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict

BASE = "runs/world/export"
TRAINED = ("uniform", "gaussian", "laplace", "gumbel", "binomial", "exponential", "gamma", "triangular")
HELD_OUT = ("logistic", "poisson", "rayleigh", "beta_binomial")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: nothing for the base, `fair` for its calibration."""
    if arg not in ("", "fair"):
        raise ValueError(f"configs/world.py takes fair or nothing after a colon; it got {arg!r}")
    config = default_config_dict()
    config.model.dtype = "float32"
    config.data.num_decimals = 1
    config.data.quantile_low, config.data.quantile_high = 0.005, 0.995
    config.data.max_length = 128
    config.train.learning_rate = 3e-3
    config.train.max_grad_norm = 1.0
    config.eval.suites = ("structured", "questions")
    config.eval.max_prompts_per_split = 60
    config.eval.num_samples = 100
    config.eval.max_new_tokens = 8
    return _calibration(config) if arg else _base(config)


def _base(config: ConfigDict) -> ConfigDict:
    config.model.lora.enabled = False
    config.model.scratch.enabled = True
    config.data.world = "habits"
    config.train.objective = "exact"
    config.train.batch_size = 64
    config.train.row_tokens = 128
    config.train.epochs = 24
    config.export.format = "merged"
    return config


def _calibration(config: ConfigDict) -> ConfigDict:
    config.model.checkpoint = BASE
    config.model.lora.dropout = 0.0
    config.model.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.data.world = "fair"
    config.data.train_families = TRAINED
    config.data.heldout_families = HELD_OUT
    config.train.objective = "paths"
    config.train.batch_size = 512
    config.train.paths_per_prompt = 16
    config.train.samples_per_prompt_per_epoch = 16
    config.train.row_tokens = 128
    config.train.epochs = 8
    return config
