"""A plan as people and programs read it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cft_jax.config import Config
from cft_jax.models.memory import MemoryEstimate
from cft_jax.plan.compiled import Report
from cft_jax.plan.programs import Work
from cft_jax.plan.topologies import Topology

_GIB = 2**30
_HEADINGS = (
    "program", "fits", "temporaries", "total", "free", "ops/ideal", "Mcycles", "ms", "peak", "per unit", "compile",
    "collectives",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a configuration's programs take on one topology.

    Attributes:
      topology: the devices.
      work: what is asked of the model.
      config: the settings that the programs were compiled with.
      memory: the estimate for the train step; its weights and optimizer are exact.
      reports: of the programs.
      found: whether the settings were found by search, because the configuration's own do not fit.
    """

    topology: Topology
    work: Work
    config: Config
    memory: MemoryEstimate
    reports: tuple[Report, ...]
    found: bool = False

    @property
    def fits(self) -> bool:
        """Whether the train step does in all its shapes, or every program of a plan without it."""
        trained = [report for report in self.reports if report.name.startswith("train")]
        return all(report.fits for report in trained or self.reports)


def flags(config: Config) -> str:
    """The settings of a plan as overrides on a command line."""
    mesh = config.mesh
    settings = {"mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp, "mesh.tensor": mesh.tensor}
    settings |= {"model.remat": config.model.remat, "train.grad_accum_steps": config.train.grad_accum_steps}
    return " ".join(f"--config.{name}={value}" for name, value in settings.items())


def lines(plan: Plan) -> Iterator[str]:
    """The plan as a table for a terminal."""
    topology, memory = plan.topology, plan.memory
    how = "found" if plan.found else "as configured"
    yield f"{topology.name}: {topology.devices} x {topology.kind}, {topology.memory / _GIB:.2f} GiB each"
    yield f"{how}: {flags(plan.config)}"
    yield (
        f"on each device weights {memory.weights / _GIB:.2f} GiB, gradients {memory.gradients / _GIB:.2f}, optimizer "
        f"{memory.optimizer / _GIB:.2f}"
    )
    if plan.work.assumed:
        yield "the shapes are the paper's, as the tokenizer is not to be had"
    rows = [_HEADINGS, *(_cells(report) for report in plan.reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        first, *others = (cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
                          for i, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "  ".join([first, *others]).rstrip()


def _cells(report: Report) -> tuple[str, ...]:
    def gib(count: int | None) -> str:
        return "" if count is None else f"{count / _GIB:.2f}"

    def known(value: int | float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else form.format(value * scale)

    return (
        report.name,
        "yes" if report.fits else "NO",
        gib(report.temporaries),
        gib(report.total),
        gib(report.available - report.total),
        known(report.flops, "{:.2f}", 1 / max(report.ideal_flops, 1)),
        known(report.cycles, "{:.1f}", 1e-6),
        known(report.seconds, "{:.1f}", 1e3),
        known(report.utilization, "{:.0f} %", 100.0),
        known(report.cycles_per_unit, "{:,.0f}/" + report.unit),
        known(report.compile_seconds, "{:.0f} s"),
        ", ".join(
            f"{kind} {traffic.count} ({traffic.bytes / 2**20:,.0f} MiB)"
            for kind, traffic in (report.collectives or {}).items()
        ),
    )


def records(plan: Plan) -> Iterator[dict[str, Any]]:
    """The plan's programs as JSON; what was not to be had is absent."""
    for report in plan.reports:
        memory = {"arguments": report.arguments, "temporaries": report.temporaries, "total": report.total}
        memory |= {"available": report.available, "weights": plan.memory.weights, "optimizer": plan.memory.optimizer}
        record = {
            "name": report.name,
            "topology": plan.topology.name,
            "fits": report.fits,
            "bytes": _known(memory),
            "flops": report.flops,
            "ideal_flops": report.ideal_flops,
            "cycles": report.cycles,
            "estimated_utilization": report.utilization,
            "collectives": report.collectives and {
                kind: {"count": traffic.count, "bytes": traffic.bytes} for kind, traffic in report.collectives.items()
            },
            "devices": plan.topology.devices,
            "settings": flags(plan.config),
            "step_seconds": report.seconds,
            "compile_seconds": report.compile_seconds,
            f"cycles_per_{report.unit}": report.cycles_per_unit,
        }  # fmt: skip
        yield _known(record)


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
