"""Starting many processes as one program, from whatever the environment says about them."""

import importlib.util
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from absl import logging

from cft_jax.common.errors import TryAgainError, UserError

# Seconds to wait for the other processes; CFT_START_SECONDS names another number.
START_SECONDS = 300
# JAX kills the process with a stack trace where its own time-out passes; ours must be the first.
_MARGIN_SECONDS = 3600
_METADATA_SECONDS = 5
# Each of these names the same thing, in the order in which they are believed.
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS")
_INDICES = ("JAX_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX")


@dataclass(frozen=True)
class Processes:
    """The processes of a run; what is None is left to JAX, which asks Slurm's variables or the TPU's metadata.

    Attributes:
      source: who says so, for messages.
      coordinator: host:port of process 0.
      count: how many there are.
      index: which of them this one is, from 0.
      local_devices: the devices of the machine that this process takes.
    """

    source: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None


def start() -> None:
    """Joins the processes of this run, where the environment says that there are several (see `find_processes`).

    To be called before any other use of JAX's devices.

    Raises:
      UserError: the environment contradicts itself.
      TryAgainError: the others did not come within the time-out.
    """
    found = find_processes(os.environ)
    if found is None:
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = _number("CFT_START_SECONDS", os.environ) or START_SECONDS
    failure = _initialize(found, seconds)
    if failure is not None:
        which = "" if found.index is None else f" (this is process {found.index} of {found.count})"
        where = "" if found.coordinator is None else f" {found.coordinator}"
        raise TryAgainError(
            f"the processes of this run, known from {found.source}, did not meet{which}: {failure}; check that every "
            f"host runs the same command and reaches the coordinator's address and port{where}"
        )
    logging.info("process %d of %d, known from %s", jax.process_index(), jax.process_count(), found.source)


def _initialize(found: Processes, seconds: int) -> str | None:
    """Starts JAX's service; None if all met, else why not."""
    done, failures = threading.Event(), []

    def meet() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address=found.coordinator,
                num_processes=found.count,
                process_id=found.index,
                local_device_ids=found.local_devices,
                # Nothing is left to find out, and asking Kubernetes for it takes rights that pods have not.
                cluster_detection_method=None if found.coordinator is None else "deactivate",
                initialization_timeout=seconds + _MARGIN_SECONDS,
            )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            failures.append(" ".join(str(error).split()))
        finally:
            done.set()

    # In a thread of its own, which is left behind where it hangs.
    threading.Thread(target=meet, daemon=True, name="meet").start()
    if not done.wait(seconds):
        return f"not all came within {seconds} s"
    return failures[0] if failures else None


def find_processes(environment: Mapping[str, str]) -> Processes | None:
    """What the environment says about the processes of this run; None for one process alone.

    Read are, in this order: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, where the last two may
    come from a Slurm step (SLURM_NTASKS, SLURM_PROCID) or an indexed Kubernetes job (JOB_COMPLETION_INDEX); a Slurm
    step alone; a TPU pod on GKE (TPU_WORKER_HOSTNAMES, MEGASCALE_NUM_SLICES) or on TPU VMs (metadata server).

    Raises:
      UserError: variables are missing, contradictory or no numbers.
    """
    in_step = ("SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment) and "SLURM_PROCID" in environment
    outside = () if in_step else ("SLURM_NTASKS", "SLURM_PROCID")
    readable = {name: value for name, value in environment.items() if name not in outside}
    count = _first(_COUNTS, readable)
    if count == 1:
        return None
    address = readable.get("JAX_COORDINATOR_ADDRESS", "")
    if address or "JAX_NUM_PROCESSES" in readable:
        return _named(address, count, _first(_INDICES, readable), readable, in_step)
    if in_step and count is not None:
        return Processes("Slurm", local_devices=_slurm_devices(readable))
    return _tpu_pod(readable)


def _named(
    address: str, count: int | None, index: int | None, environment: Mapping[str, str], in_step: bool
) -> Processes:
    if in_step and not address:
        return Processes("Slurm", count=count, index=index, local_devices=_slurm_devices(environment))
    given = {"JAX_COORDINATOR_ADDRESS": address, _COUNTS[0]: count, _INDICES[0]: index}
    missing = [name for name, value in given.items() if value in ("", None)]
    if missing:
        raise UserError(
            f"{', '.join(missing)} must be set too: {', '.join(given)} belong together (or start the processes by "
            "srun, or as an indexed Kubernetes job)"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port, of the machine of process 0")
    assert count is not None and index is not None
    if not 0 <= index < count:
        raise UserError(f"this is process {index} of {count}; they are counted from 0 to {count - 1}")
    devices = _slurm_devices(environment) if in_step else None
    return Processes("JAX_COORDINATOR_ADDRESS", address, count, index, devices)


def _slurm_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of one task: the one it is bound to, all of a machine of its own, or the n-th of the n-th task."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(visible) == 1:  # bound by Slurm
        return (0,)
    nodes = _number("SLURM_STEP_NUM_NODES", environment) or _number("SLURM_NNODES", environment)
    gpus = len(visible) or _number("SLURM_GPUS_ON_NODE", environment)
    if nodes is not None and gpus and _number("SLURM_NTASKS", environment) == nodes:  # one task per machine
        return tuple(range(gpus))
    local = _number("SLURM_LOCALID", environment)
    return None if local is None else (local,)


def _tpu_pod(environment: Mapping[str, str]) -> Processes | None:
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if len([host for host in hosts.split(",") if host]) > 1 or (_number("MEGASCALE_NUM_SLICES", environment) or 1) > 1:
        return Processes("the TPU pod's variables")
    # JAX sets the variable when it is imported on a machine without TPU chips; GKE's machines name their hosts above.
    if hosts or "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return None
    return Processes("the TPU's metadata server") if metadata_workers(environment) > 1 else None


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


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> int | None:
    return next((number for name in names if (number := _number(name, environment)) is not None), None)


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.strip().isdigit():
        raise UserError(f"{name}={text!r} in the environment must be a whole number")
    return int(text)
