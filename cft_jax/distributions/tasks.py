"""A task: one prompt and the distribution that its answers should follow."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cft_jax.common.errors import UserError
from cft_jax.distributions.output_space import NumberSpace, OutputSpace, number_space
from cft_jax.distributions.splits import PromptSpec


@dataclass(frozen=True)
class SpaceSettings:
    """How the continuous families are discretised: the arguments of `output_space`."""

    num_decimals: int = 5
    max_bins: int = 1001
    quantile_low: float = 0.001
    quantile_high: float = 0.999
    tail_policy: str = "clip_to_edge_bin"


@dataclass(frozen=True)
class Task:
    """One prompt; exactly one of `spec` (a family with parameters) and `space` (listed values) is set.

    `group` is the unit of equal weight in averages and in balanced orders: the family id, or "custom".
    """

    split: str
    group: str
    task_id: str
    messages: tuple[Mapping[str, str], ...]
    spec: PromptSpec | None = None
    space: OutputSpace | None = None
    weight: float = 1.0

    def grid(self, settings: SpaceSettings) -> NumberSpace | OutputSpace:
        """The listed values of this task; of a family the grid by `settings`, its strings not yet written.

        Raises:
          UserError: see `number_space`; or most of the family's probability lies beyond the grid.
        """
        if self.space is not None:
            return self.space
        if self.spec is None:
            raise ValueError(f"task {self.task_id} has neither a spec nor a space")
        space = number_space(self.spec, **vars(settings))
        if space.lost_mass > 0.5:  # such a grid teaches another distribution
            raise UserError(
                f"task {self.task_id}: {100 * space.lost_mass:.3g} % of the probability of {self.spec.family_id} with "
                f"{dict(self.spec.parameters)} lies beyond the {space.probabilities.size} values of the grid; set "
                f"config.data.space=full, raise config.data.max_bins={settings.max_bins} or take wider quantiles"
            )
        return space

    def output_space(self, settings: SpaceSettings) -> OutputSpace:
        """As `grid`, with all strings written."""
        space = self.grid(settings)
        return space.listed() if isinstance(space, NumberSpace) else space


def task_from_spec(spec: PromptSpec) -> Task:
    """The task of one of the families' prompts."""
    message = {"role": "user", "content": spec.prompt}
    return Task(spec.split, spec.family_id, spec.distribution_id, (message,), spec=spec)


def digest_of_tasks(tasks: Iterable[Task]) -> str:
    """SHA-256 of all that tasks say, in their order: equal on every machine, another one after any edit.

    A family's probabilities are left out: they follow from its parameters, up to rounding that depends on the CPU.
    """
    digest = hashlib.sha256()
    for task in tasks:
        said: list[object] = [task.split, task.group, task.task_id, task.weight, [dict(m) for m in task.messages]]
        if task.spec is not None:
            said += [task.spec.family_id, [[name, float(value)] for name, value in task.spec.parameters.items()]]
        if task.space is not None:
            said += [task.space.values, task.space.probabilities.tolist()]
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()
