"""What to ask the model about a prompt for its exact metrics."""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cft_jax.common.errors import UserError
from cft_jax.distributions.analytic_space import analytic_space
from cft_jax.distributions.output_space import OutputSpace
from cft_jax.distributions.tasks import Task
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.metrics import paths
from cft_jax.evaluate.suites.structured.exact_metrics import AnalyticPlan, ListedPlan, path_kl
from cft_jax.evaluate.suites.structured.settings import PromptCodec, Resolution

# The paper scores its path KL at 2 decimals, whatever the training resolution, on 4 strings per prompt.
PAPER_PATH_DECIMALS = 2
PAPER_PATH_DRAWS = 4
# A full-resolution space of up to so many strings is listed; of a larger one so many of the most probable prefixes are
# scored, and for what lies below them so many drawn strings.
MAX_LISTED = 4096
MAX_PREFIXES = 1024
DRAWN_STRINGS = 64


def plan_of(task: Task, codec: PromptCodec, resolution: Resolution, seed: int) -> ListedPlan | AnalyticPlan:
    """The plan of a task; what is drawn depends on the seed and the task alone."""
    if task.spec is None or not resolution.full_quantile:
        space = task.output_space(resolution.grid)
    else:
        full = analytic_space(task.spec, num_decimals=resolution.grid.num_decimals, quantile=resolution.full_quantile)
        if full.num_values > MAX_LISTED:
            trie = codec.analytic_trie(full)
            drawn = full.draw(task_rng(task, seed, "full").random(DRAWN_STRINGS))
            # The longest string is one of the two ends.
            longest = int(trie.encode(np.array([full.first, full.last]))[1].max())
            return AnalyticPlan(task, trie, trie.expand(MAX_PREFIXES, longest, drawn), resolution)
        integers = np.arange(full.first, full.last + 1)
        space = OutputSpace(tuple(full.strings(integers)), full.interval_masses(integers, integers + 1))
    return ListedPlan(task, space, codec.build_trie(space), resolution)


def paper_path_kl(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    tasks: Sequence[Task],
    codec: PromptCodec,
    resolution: Resolution,
    seed: int,
) -> dict[int, float]:
    """The paper's path KL in nats, over a few drawn strings at the paper's resolution, by index of the task.

    The draws depend on the seed and the task alone. Families that only an analytic space holds have none.
    """
    drawn = {}
    for i, task in enumerate(tasks):
        try:
            space = task.output_space(replace(resolution.grid, num_decimals=PAPER_PATH_DECIMALS))
        except UserError:
            if not resolution.full_quantile:
                raise
            continue
        rng = task_rng(task, seed, "path")
        strings = rng.choice(space.probabilities.size, size=PAPER_PATH_DRAWS, p=space.probabilities)
        drawn[i] = codec.build_trie(space), strings
    if not drawn:
        return {}
    tries = [trie for trie, _ in drawn.values()]
    prefixes = [paths.path_prefixes(trie, strings) for trie, strings in drawn.values()]
    scores = backend.score([prompts[i] for i in drawn], tries, prefixes=prefixes)
    return {
        i: float(np.mean(path_kl(trie, score, resolution.epsilon)[strings]))
        for (i, (trie, strings)), score in zip(drawn.items(), scores, strict=True)
    }


def task_rng(task: Task, seed: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on the seed, the task and what they are for, and on nothing else."""
    return np.random.default_rng([seed, zlib.crc32(f"{purpose}/{task.split}/{task.task_id}".encode())])
