"""One program compiled for a topology: whether it fits, what it takes and how long it would run."""

import dataclasses
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from cft_jax.common.files import user_cache, write_json
from cft_jax.models.flops import peak_flops
from cft_jax.plan import hlo
from cft_jax.plan.hlo import Traffic
from cft_jax.plan.programs import Program
from cft_jax.plan.topologies import Topology, libtpu_version

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Of the compiler's several ways to say that memory is short.
_USED = re.compile(r"(?:Used |required for [\w ]*\()([\d.]+)([KMGT]?)")


@dataclass(frozen=True)
class Report:
    """What one device needs to run a program; what was not to be had is None.

    Attributes:
      name: of the program.
      fits: into the memory of each device.
      arguments, temporaries, total: bytes; results that take the place of arguments count once.
      available: bytes.
      flops: operations of the compiled program.
      ideal_flops: operations that the method asks for; see `Operations`.
      cycles: as the compiler estimates them.
      seconds: cycles at the device's clock.
      utilization: ideal operations in that time, as a share of the peak.
      collectives: by kind.
      compile_seconds: on this machine.
      unit, cycles_per_unit: what the program makes, and its cycles for one of that.
    """

    name: str
    fits: bool
    arguments: int | None
    temporaries: int | None
    total: int
    available: int
    flops: int | None
    ideal_flops: int
    cycles: int | None
    seconds: float | None
    utilization: float | None
    collectives: Mapping[str, Traffic] | None
    compile_seconds: float | None
    unit: str
    cycles_per_unit: float | None


def compiled_report(program: Program, topology: Topology, *, resident: int) -> Report:
    """Compiles a program and reads off what it takes; what was compiled before is remembered in the user's cache.

    `resident` are the bytes of its weights and optimizer on a device, for a program so large that the compiler ends
    with the sum of all that it needs.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails for another reason than a lack of memory.
    """
    lowered = program.lower()
    kept = user_cache("plan") / f"{_digest(lowered, topology)}.json"
    if kept.exists():
        figures = json.loads(kept.read_text(encoding="utf-8"))
    else:
        figures = _compiled(lowered, resident)
        write_json(kept, figures)
    collectives = {kind: Traffic(**traffic) for kind, traffic in figures.pop("collectives", {}).items()}
    return _report(program, topology, **figures, collectives=collectives)


def _digest(lowered: Lowered, topology: Topology) -> str:
    """Identifies a program, its devices and the compiler."""
    content = {"program": lowered.as_text(), "devices": (topology.libtpu or topology.kind, topology.devices)}
    content |= {"versions": (jax.__version__, libtpu_version()), "flags": os.environ.get("LIBTPU_INIT_ARGS", "")}
    content |= {"code": Path(hlo.__file__).read_text(encoding="utf-8")}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _compiled(lowered: Lowered, resident: int) -> dict[str, Any]:
    """What the compiler says, as JSON."""
    start = time.monotonic()
    compiled = compile_or_need(lowered)
    seconds = time.monotonic() - start
    if isinstance(compiled, int):
        memory = {"arguments": resident, "temporaries": max(compiled - resident, 0), "total": compiled}
        return memory | {"compile_seconds": seconds}
    cost = hlo.cost_of(compiled.as_text() or "")
    return memory_of(compiled) | {
        "flops": cost.flops,
        "cycles": cost.cycles or None,
        "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in cost.collectives.items()},
        "compile_seconds": seconds,
    }


def compile_or_need(lowered: Lowered) -> Compiled | int:
    """The compiled program, or the bytes of a device that the compiler says it would need and does not find.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails for another reason than a lack of memory.
    """
    try:
        with warnings.catch_warnings():
            # JAX keeps programs for devices that are not there, and cannot read them again.
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return needed


def estimated_report(program: Program, topology: Topology, *, arguments: int, temporaries: int) -> Report:
    """The same from an estimate of the memory alone, where there is no compiler for the devices."""
    return _report(program, topology, total=arguments + temporaries, arguments=arguments, temporaries=temporaries)


def _report(
    program: Program,
    topology: Topology,
    *,
    total: int,
    compile_seconds: float | None = None,
    arguments: int | None = None,
    temporaries: int | None = None,
    flops: int | None = None,
    cycles: int | None = None,
    collectives: Mapping[str, Traffic] | None = None,
) -> Report:
    ideal = program.ideal_flops // topology.devices
    seconds = cycles / topology.clock if cycles and topology.clock else None
    peak = peak_flops(topology.kind)
    return Report(
        name=program.name,
        fits=total <= topology.memory,
        arguments=arguments,
        temporaries=temporaries,
        total=total,
        available=topology.memory,
        flops=flops,
        ideal_flops=ideal,
        cycles=cycles,
        seconds=seconds,
        utilization=ideal / seconds / peak if seconds and peak else None,
        collectives=collectives,
        compile_seconds=compile_seconds,
        unit=program.unit,
        cycles_per_unit=cycles / program.units if cycles else None,
    )


def memory_of(compiled: Compiled) -> dict[str, int]:
    """Bytes of arguments, of temporaries, and of all together."""
    found: Any = compiled.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    total = found.argument_size_in_bytes + found.temp_size_in_bytes + results + found.generated_code_size_in_bytes
    return {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes, "total": total}


def _needed(message: str) -> int | None:
    """Bytes that the compiler says it would need; None where the message is of something else."""
    found = _USED.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
