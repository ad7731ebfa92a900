"""Building and caching the tokenised training data; needs the tokenizer, not the weights."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_json
from cft_jax.common.storage import opened
from cft_jax.config import Config
from cft_jax.data.batch import padding_fraction
from cft_jax.data.objectives import training_dataset
from cft_jax.data.prepared import prepare
from cft_jax.data.render import render_example
from cft_jax.data.spaces import task_space
from cft_jax.distributions import Task, configured_tasks
from cft_jax.distributions.analytic_space import AnalyticSpace
from cft_jax.distributions.splits import TRAIN
from cft_jax.runs.base import run_tokenizer

_SAMPLED_STEPS = 16


def start(config: Config, output: str) -> None:
    """The command: prepares the data, writes `prepare.json` into `output` and prints what is in it.

    Raises:
      UserError: see `prepare_data`; or `output` cannot be written.
    """
    with opened(output, write=True, flag="--output") as target:
        try:
            # Before minutes of work.
            target.path.mkdir(parents=True, exist_ok=True)
            figures, example = prepare_data(config)
            write_json(target.path / "prepare.json", figures)
        except OSError as error:
            raise UserError(f"cannot write --output={output}: {error.strerror or error}; name another one") from error
    width = max(map(len, figures))
    lines = [f"{name:{width}}  {f'{value:,}' if isinstance(value, int) else value}" for name, value in figures.items()]
    end = f"written to {output}/prepare.json; cft_jax.main with this config finds the data"
    sys.stdout.write("\n".join([example, *lines, end]) + "\n")


def prepare_data(config: Config) -> tuple[dict[str, Any], str]:
    """Builds the training split's data, or finds it in the cache.

    Returns:
      The figures, and one example in words. `prompts`, `values`, `prefixes`, `max_children` and `bytes` count what is
      cached, `seconds` the work up to there, loading the tokenizer included. Hard targets cache nothing: they have
      `prompts`, and `seconds` up to the first batch. `padding_fraction` and `shapes` (rows, tokens, steps, target
      entries) are those of the first batches. `lost_mass` is the largest share of a prompt's probability that none of
      its values stands for, and `lost_mass_prompt`, where there is any, that prompt.

    Raises:
      UserError: see `configured_tasks`, `load_tokenizer`, `prepare` and `training_dataset`.
    """
    start = time.monotonic()
    tasks = configured_tasks(config.data)
    tokenizer = run_tokenizer(config, tasks)
    tokenizer_seconds = time.monotonic() - start
    figures: dict[str, Any] = {"prompts": len(tasks[TRAIN])}
    if config.data.target == "soft":
        figures = prepare(tokenizer, tasks[TRAIN], config.data).statistics()
        figures["seconds"] = round(time.monotonic() - start, 3)
    dataset = training_dataset(config, tokenizer, tasks[TRAIN], row_multiple=1, share_prefix=False)
    batch = dataset.batch(0)
    figures.setdefault("seconds", round(time.monotonic() - start, 3))
    figures["tokenizer_seconds"] = round(tokenizer_seconds, 3)
    steps = range(min(_SAMPLED_STEPS, dataset.steps_per_epoch))
    figures["padding_fraction"] = round(float(np.mean([padding_fraction(dataset.batch(step)) for step in steps])), 4)
    figures |= _largest_loss(tasks[TRAIN], config)
    figures["shapes"] = [list(shape) for shape in dataset.shapes]
    figures["steps_per_epoch"] = dataset.steps_per_epoch
    return figures, render_example(tokenizer, batch, dataset.shared_prefix)


def _largest_loss(tasks: Sequence[Task], config: Config) -> dict[str, Any]:
    spaces = ((task, task_space(task, config.data)) for task in tasks)
    # Rounded: sums of probabilities leave 1e-15 over.
    losses = [(round(space.lost_mass, 6), task) for task, space in spaces if not isinstance(space, AnalyticSpace)]
    loss, task = max(losses, key=lambda pair: pair[0], default=(0.0, None))
    named = {"lost_mass_prompt": task.messages[-1]["content"]} if task and loss else {}
    return {"lost_mass": loss, **named}
