"""The smallest run that does everything: two families of short numbers, a model of two layers, seconds of training."""

from ml_collections import ConfigDict

from cft_jax.config import default_config_dict


def get_config() -> ConfigDict:
    """No argument is taken."""
    config = default_config_dict()
    config.model.dtype = "float32"
    config.model.lora.enabled = False
    config.model.scratch.update(
        enabled=True, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48
    )
    config.data.num_decimals = 1
    config.data.max_bins = 21
    config.data.train_families = ("geometric", "exponential")
    config.data.heldout_families = ("poisson",)
    config.data.grid_points = 4
    config.data.unseen = "inside"
    config.data.readable_parameters = True
    config.train.batch_size = 4
    config.train.epochs = 3
    config.train.learning_rate = 1e-2
    config.checkpoint.every_steps = 3
    config.eval.max_prompts_per_split = 2
    config.eval.num_samples = 20
    config.eval.max_new_tokens = 8
    config.export.format = "merged"
    config.log.every_steps = 2
    return config
