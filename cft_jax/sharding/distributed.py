"""Starting many processes as one program."""

import os

import jax
from absl import logging

from cft_jax.common.errors import UserError

TIMEOUT_SECONDS = 300


def start() -> None:
    """Joins the processes of this run, where the environment says that there are several.

    Read are JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, Slurm's variables, and those of a TPU
    pod; one process alone needs nothing. To be called before any other use of JAX's devices.

    Raises:
      UserError: the others did not come within the time-out.
    """
    if not _several_processes():
        return
    named = "JAX_NUM_PROCESSES" in os.environ
    count = int(os.environ["JAX_NUM_PROCESSES"]) if named else None
    index = int(os.environ["JAX_PROCESS_ID"]) if named else None
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(num_processes=count, process_id=index, initialization_timeout=TIMEOUT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not meet within {TIMEOUT_SECONDS} s ({error}); check that every host runs "
            "the same command and reaches the coordinator's address and port"
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def _several_processes() -> bool:
    env = os.environ
    if int(env.get("JAX_NUM_PROCESSES", "1")) > 1:
        return True
    in_step = "SLURM_STEP_ID" in env or "SLURM_STEPID" in env
    if in_step and int(env.get("SLURM_NTASKS", "1")) > 1:
        return True
    return len([host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]) > 1
