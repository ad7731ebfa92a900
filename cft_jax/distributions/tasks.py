"""A task: one prompt and the distribution that its answers should follow."""

from collections.abc import Mapping
from dataclasses import dataclass

from cft_jax.distributions.output_space import OutputSpace, output_space
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

    def output_space(self, settings: SpaceSettings) -> OutputSpace:
        """The listed values of this task; of a family, discretised by `settings`."""
        if self.space is not None:
            return self.space
        if self.spec is None:
            raise ValueError(f"task {self.task_id} has neither a spec nor a space")
        return output_space(
            self.spec,
            num_decimals=settings.num_decimals,
            max_bins=settings.max_bins,
            quantile_low=settings.quantile_low,
            quantile_high=settings.quantile_high,
            tail_policy=settings.tail_policy,
        )


def task_from_spec(spec: PromptSpec) -> Task:
    """The task of one of the families' prompts."""
    message = {"role": "user", "content": spec.prompt}
    return Task(spec.split, spec.family_id, spec.distribution_id, (message,), spec=spec)
