"""The tasks that a configuration asks for."""

from cft_jax.config import DataConfig
from cft_jax.distributions.custom import read_tasks
from cft_jax.distributions.splits import SPLITS, build_splits
from cft_jax.distributions.tasks import SpaceSettings, Task, task_from_spec
from cft_jax.distributions.world import world_tasks


def configured_tasks(data: DataConfig) -> dict[str, list[Task]]:
    """Tasks by split: the rows of `data.custom` where it names a file, the small world's, else the families' prompts.

    Every split of `SPLITS` is a key; custom data may leave some empty, and the world has one more.

    Raises:
      UserError: unknown families, bad rows of custom data, or options that contradict each other.
    """
    if data.custom:
        tasks = read_tasks(data.custom)
        return {split: [task for task in tasks if task.split == split] for split in SPLITS}
    if data.world != "none":
        return world_tasks(
            data.world,
            train_families=data.train_families,
            heldout_families=data.heldout_families,
            settings=space_settings(data),
        )
    splits = build_splits(
        selection=data.eval_prompt_selection,
        train_families=data.train_families,
        heldout_families=data.heldout_families,
        unseen=data.unseen,
        grid_points=data.grid_points,
        readable_parameters=data.readable_parameters,
        parameter_digits=data.parameter_digits,
    )
    return {split: [task_from_spec(spec) for spec in specs] for split, specs in splits.items()}


def space_settings(data: DataConfig) -> SpaceSettings:
    """How the configuration discretises the continuous families."""
    return SpaceSettings(data.num_decimals, data.max_bins, data.quantile_low, data.quantile_high, data.tail_policy)
