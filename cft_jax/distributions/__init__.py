"""Distributions as prompts name them: families, splits of prompts, output spaces, parsing of answers."""

from cft_jax.distributions.configured import configured_tasks, space_settings
from cft_jax.distributions.custom import read_tasks
from cft_jax.distributions.families import FAMILIES, HELDOUT_FAMILIES, TRAIN_FAMILIES, Family, find_family
from cft_jax.distributions.output_space import NumberSpace, OutputSpace, number_space, output_space
from cft_jax.distributions.parse import ParsedNumber, number_error, parse_number, parse_numbers, strip_thinking
from cft_jax.distributions.splits import SPLITS, PromptSpec, build_splits, spread
from cft_jax.distributions.tasks import SpaceSettings, Task, task_from_spec

__all__ = [
    "FAMILIES", "HELDOUT_FAMILIES", "SPLITS", "TRAIN_FAMILIES", "Family", "NumberSpace", "OutputSpace", "ParsedNumber",
    "PromptSpec", "SpaceSettings", "Task", "build_splits", "configured_tasks", "find_family", "number_error",
    "number_space", "output_space", "parse_number", "parse_numbers", "read_tasks", "space_settings", "spread",
    "strip_thinking", "task_from_spec",
]  # fmt: skip
