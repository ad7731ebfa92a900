"""Starting many processes as one program: what `jax.distributed.initialize` leaves to its caller."""

import importlib.util
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import jax
from absl import logging

from cft_jax.common.errors import TryAgainError, UserError

# Seconds to wait for the other processes; CFT_START_SECONDS names another number.
START_SECONDS = 300
# JAX kills the process with a stack trace where its own time-out passes; ours must be the first.
_MARGIN_SECONDS = 3600
_METADATA_SECONDS = 5


def start() -> None:
    """Joins the processes of this run, where the environment says that there are several (see `find_processes`).

    To be called before any other use of JAX's devices.

    Raises:
      UserError: the environment contradicts itself.
      TryAgainError: the others did not come within the time-out.
    """
    options = find_processes(os.environ)
    if options is None:
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = _number(os.environ, "CFT_START_SECONDS") or START_SECONDS
    met: Future[None] = Future()

    def meet() -> None:
        try:
            jax.distributed.initialize(**options, initialization_timeout=seconds + _MARGIN_SECONDS)
            met.set_result(None)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            met.set_exception(error)

    # In a thread of its own, which is left behind where it hangs.
    threading.Thread(target=meet, daemon=True, name="meet").start()
    try:
        met.result(seconds)
    except (TypeError, ValueError) as error:
        raise UserError(f"the processes of this run cannot meet: {' '.join(str(error).split())}") from error
    except (OSError, RuntimeError) as error:
        failure = " ".join(str(error).split()) if met.done() else f"not all came within {seconds} s"
        which = " (this is process {process_id} of {num_processes})".format(**options) if options else ""
        raise TryAgainError(
            f"the processes of this run did not meet{which}: {failure}; check that every host runs the same command "
            f"and reaches the coordinator's address and port {options.get('coordinator_address', '')}".rstrip()
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def find_processes(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` that the environment gives; None for one process alone.

    Read are JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, where the last two may come from a Slurm
    step (SLURM_NTASKS, SLURM_PROCID) or an indexed Kubernetes job (JOB_COMPLETION_INDEX); else a Slurm step alone; else
    a TPU pod on GKE (TPU_WORKER_HOSTNAMES, MEGASCALE_NUM_SLICES) or on TPU VMs (metadata server). What is not among
    the arguments JAX finds by itself.

    Raises:
      UserError: variables are missing or no numbers.
    """
    in_step = ("SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment) and "SLURM_PROCID" in environment
    if not in_step:
        # What Slurm tells the batch script is about the job's tasks, none of which it is.
        environment = {name: value for name, value in environment.items() if not name.startswith("SLURM_")}
    count = _number(environment, "JAX_NUM_PROCESSES", "SLURM_NTASKS")
    index = _number(environment, "JAX_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
    address = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if count == 1:
        return None
    if count is None and not address:
        return {} if _in_tpu_pod(environment) else None
    given = {"JAX_COORDINATOR_ADDRESS": address or None, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
    missing = [name for name, value in given.items() if value is None]
    if missing and not in_step:
        raise UserError(
            f"{', '.join(missing)} must be set too: {', '.join(given)} belong together (or start the processes by "
            "srun, or as an indexed Kubernetes job)"
        )
    options: dict[str, Any] = {"num_processes": count, "process_id": index}
    if in_step and (devices := _slurm_devices(environment)) is not None:
        options["local_device_ids"] = devices
    if not address:
        return options
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port, of the machine of process 0")
    # Nothing is left to find out, and asking Kubernetes for it takes rights that pods have not.
    return options | {"coordinator_address": address, "cluster_detection_method": "deactivate"}


def _slurm_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of one task: the one it is bound to, all of a machine of its own, or the n-th of the n-th task."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = len(visible) or _number(environment, "SLURM_GPUS_ON_NODE") or 0
    alone = _number(environment, "SLURM_NTASKS") == _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    if gpus == 1 or (gpus and alone):
        return tuple(range(gpus))
    local = _number(environment, "SLURM_LOCALID")
    return None if local is None else (local,)


def _in_tpu_pod(environment: Mapping[str, str]) -> bool:
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or (_number(environment, "MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    # JAX sets the variable when it is imported on a machine without TPU chips; GKE's machines name their hosts above.
    if hosts or "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return False
    return metadata_workers(environment) > 1


def metadata_workers(environment: Mapping[str, str]) -> int:
    """How many machines the metadata server of a TPU VM lists; 1 where there is no such server (Colab, say)."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request: Any = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return len(answer.read().decode().split(","))
    except (urllib.error.URLError, TimeoutError):
        return 1


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is set."""
    for name in names:
        text = environment.get(name, "").strip()
        if text and not text.isdigit():
            raise UserError(f"{name}={text!r} in the environment must be a whole number")
        if text:
            return int(text)
    return None
