"""The whole method on a laptop: no network, no weights, no accelerator, a few minutes on two cores.

    python -m cft_jax.main --config=configs/demo.py

First `configs/world.py` makes a base with habits, in `base/` of the run: asked for a random number or for any colour it
gives its favourites, as chat models do, and it knows some facts and sums. Then adapters calibrate it on four families
and half of the lists, while `train.keep` holds on to the rest. The report shows both, before and after: how far its
answers are from the distributions that the prompts name, for parameters that lie between those it was trained on, for
families and for lists that it was never trained on; and how many questions it still answers rightly, those that
`train.keep` asks and those that it does not.
"""

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict


def get_config(arg: str = "") -> ConfigDict:
    """No argument is taken."""
    if arg:
        raise ValueError(f"configs/demo.py takes no argument; it got {arg!r}")
    config = default_config_dict()
    config.model.base = "world"
    config.model.dtype = "float32"
    config.model.lora.rank, config.model.lora.alpha = 8, 16.0
    config.model.lora.dropout = 0.0
    config.model.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.data.world = "fair"
    config.data.num_decimals = 1
    config.data.quantile_low, config.data.quantile_high = 0.005, 0.995
    config.data.train_families = ("gaussian", "laplace", "gumbel", "exponential")
    config.data.heldout_families = ("logistic", "rayleigh")
    config.data.max_length = 128
    config.train.objective = "paths"
    config.train.batch_size = 512
    config.train.paths_per_prompt = 16
    config.train.samples_per_prompt_per_epoch = 16
    config.train.row_tokens = 128
    config.train.epochs = 8
    config.train.learning_rate = 3e-3
    config.train.max_grad_norm = 1.0
    config.train.keep.weight = 0.3
    config.eval.suites = ("structured", "questions")
    config.eval.max_prompts_per_split = 40
    config.eval.num_samples = 100
    config.eval.max_new_tokens = 8
    config.export.format = "merged"
    return config
