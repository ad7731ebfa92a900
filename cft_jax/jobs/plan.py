"""Planning: every program of a configuration compiled for devices that need not be there."""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.errors import UserError
from cft_jax.common.storage import check_file, write_file
from cft_jax.config import Config
from cft_jax.plan.compiled import compiled_report, estimated_report
from cft_jax.plan.programs import Work, programs, work_of
from cft_jax.plan.search import abstract_mesh, candidates, estimate, least_memory
from cft_jax.plan.table import Plan, flags, lines, records
from cft_jax.plan.topologies import Topology, compiler_devices, larger, libtpu_version
from cft_jax.runs.workdir import versions
from cft_jax.sharding.mesh import make_mesh

# Settings found by the estimate that are compiled before a topology is given up.
_TRIES = 3
_GIB = 2**30


def start(
    config: Config,
    topologies: Sequence[Topology],
    *,
    output: str | None,
    kinds: tuple[str, ...],
    rows_per_device: int | None,
) -> None:
    """The command: compiles for each topology, prints the tables, writes the figures.

    With `rows_per_device` the batch has so many rows for each device of a topology, else what the configuration says.

    Raises:
      UserError: see `plans_of`; nothing fits anywhere; or `output` exists or cannot be written.
    """
    if output and Path(output).exists():
        raise UserError(f"--output={output} exists; name a file that does not")
    if output:
        check_file(output, "plan.json")
    if all(one.libtpu for one in topologies):
        # The compiler needs no TPU, and a TPU that is there may belong to another process.
        jax.config.update("jax_platforms", "cpu")
    else:
        prepare_compilers()
    work, plans = functools.cache(work_of), []
    for one in topologies:
        own = config
        if rows_per_device:
            batch_size = rows_per_device * one.devices
            own = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
        plans += plans_of(work(own), own, one, kinds)
    if not any(plan.fits for plan in plans):
        raise UserError(_nowhere(plans))
    if output:
        write_file(output, json.dumps(_record(plans), indent=2) + "\n")
    for plan in plans:
        sys.stdout.write("\n".join([*lines(plan), "", ""]))


def plans_of(work: Work, config: Config, where: Topology, kinds: tuple[str, ...]) -> Iterator[Plan]:
    """The plan of the configuration on a topology and, where the train step does not fit, one with other settings.

    Raises:
      UserError: see `compiler_devices`; the configuration's mesh does not divide the devices.
    """
    devices = compiler_devices(where)
    own = _plan(work, config, where, devices, ("train",) if "train" in kinds else ())
    if own.fits:
        rest = _plan(work, config, where, devices, tuple(kind for kind in kinds if kind != "train"))
        yield dataclasses.replace(own, reports=own.reports + rest.reports)
        return
    yield own
    for changed, _ in itertools.islice(candidates(work, config, where), _TRIES):
        logging.info("%s: not as configured; trying %s", where.name, flags(changed))
        found = dataclasses.replace(_plan(work, changed, where, devices, kinds), found=True)
        if found.fits:
            yield found
            return


def _plan(work: Work, config: Config, where: Topology, devices: Sequence[Any] | None, kinds: tuple[str, ...]) -> Plan:
    """The programs compiled with a configuration's own settings, up to the first that does not fit."""
    mesh = abstract_mesh(config, where)
    if devices is None:
        # Only the train step's memory is estimated.
        kinds = tuple(kind for kind in kinds if kind == "train")
    else:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices)
    memory, reports = estimate(work, config, mesh, where), []
    for program in programs(work, config, mesh, kinds):
        if devices is None:
            arguments = memory.weights + memory.optimizer
            reports.append(estimated_report(program, where, arguments=arguments, temporaries=memory.total - arguments))
        else:
            logging.info("%s: compiling %s", where.name, program.name)
            resident = memory.weights + (memory.optimizer if program.name.startswith("train") else 0)
            reports.append(compiled_report(program, where, resident=resident))
        if not reports[-1].fits:
            break
    return Plan(where, work, config, memory, tuple(reports))


def _record(plans: Sequence[Plan]) -> dict[str, Any]:
    """The plans as JSON: programs with the configuration's own settings, and those with settings found by search."""
    own = [record for plan in plans if not plan.found for record in records(plan)]
    found = [record for plan in plans if plan.found for record in records(plan)]
    return {"programs": own, "found": found, "versions": versions() | libtpu_version()}


def _nowhere(plans: Sequence[Plan]) -> str:
    """That a configuration fits nowhere, and where it would."""
    last = plans[-1]
    sizes = ", ".join(
        f"{plan.topology.name} (at least {least_memory(plan.work, plan.config, plan.topology) / _GIB:.1f} of "
        f"{plan.topology.memory / _GIB:.1f} GiB a device)"
        for plan in plans
        if not plan.found
    )
    others = ((one, *found) for one in larger(last.topology) for found in candidates(last.work, last.config, one))
    other = next(others, None)
    hint = "take a larger topology, LoRA or a smaller model"
    if other is not None:
        hint = f"by the estimate it fits on {other[0].name} with {flags(other[1])}"
    return f"{last.config.model.checkpoint or 'the model'} fits into none of {sizes}; {hint}"
