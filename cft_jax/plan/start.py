"""Whether a run's train step fits its devices, by their own compiler, before any weight is loaded."""

import time

from absl import logging
from jax.sharding import Mesh

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.models.abstract import abstract_model
from cft_jax.plan.compiled import compile_or_need, memory_of
from cft_jax.plan.programs import Work, row_multiple, train_program
from cft_jax.runs.base import model_options

_GIB = 2**30


def check_step(work: Work, config: Config, mesh: Mesh, *, available: int | None) -> str:
    """Compiles the train step in its largest shape, from shapes alone; says what it takes of each device.

    `available` are the bytes that a device has, None where it does not tell.

    Raises:
      UserError: the compiler finds that it does not fit.
    """
    model = abstract_model(work.model, **model_options(config.model, mesh))
    shape = max(work.shapes(row_multiple(config, mesh)), key=lambda shape: shape[0] * shape[1])
    start = time.monotonic()
    compiled = compile_or_need(train_program(work, config, model, shape).lower())
    hint = "python -m cft_jax.plan finds settings that fit"
    if isinstance(compiled, int):
        raise UserError(f"the train step needs {compiled / _GIB:.2f} GiB, more than each device has; {hint}")
    memory = memory_of(compiled)
    if available is not None and memory["total"] > available:
        # A GPU's compiler refuses nothing.
        logging.warning("the train step needs %.2f GiB of each device's %.2f; %s", *_gib(memory, available), hint)
    return (
        f"by the compiler, the train step takes {memory['total'] / _GIB:.2f} GiB of each device: "
        f"{memory['temporaries'] / _GIB:.2f} beside its arguments (compiled in {time.monotonic() - start:.0f} s)"
    )


def _gib(memory: dict[str, int], available: int) -> tuple[float, float]:
    return memory["total"] / _GIB, available / _GIB
