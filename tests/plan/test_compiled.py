"""What is read off a compiled program, here one for the CPU, and what is remembered of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cft_jax.plan.compiled import compiled_report, estimated_report
from cft_jax.plan.programs import Program
from cft_jax.plan.topologies import Topology

# 1 TiB and 1 GHz by choice.
HERE = Topology("here", "cpu", 2, 2**40, 1e9)


def lowered():
    x = jax.ShapeDtypeStruct((64, 32), np.float32)
    return jax.jit(lambda x: (x @ x.T).sum(0)).lower(x)


def test_a_report_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = Program("products", lowered, 2 * 1000, "row", 64.0)
    report = compiled_report(program, HERE, resident=0)
    # By hand: 64 x 32 numbers of four bytes, 2 x 64 x 32 x 64 operations; half of the ideal ones on each device.
    assert (report.arguments, report.flops, report.ideal_flops) == (64 * 32 * 4, 2 * 64 * 32 * 64, 1000)
    assert report.fits and report.total >= report.arguments and report.collectives == {}
    # The CPU's compiler counts no cycles.
    assert report.cycles is report.seconds is report.utilization is report.cycles_per_unit is None
    (file,) = (tmp_path / "cft_jax" / "plan").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cycles": 5000}))
    again = compiled_report(program, HERE, resident=0)
    assert (again.cycles, again.cycles_per_unit) == (5000, 5000 / 64)
    assert again.seconds == pytest.approx(5e-6) and again.compile_seconds == report.compile_seconds
    small = dataclasses.replace(HERE, memory=report.total - 1)
    assert not compiled_report(program, small, resident=0).fits


def test_an_estimate_has_memory_alone():
    report = estimated_report(Program("products", lowered, 10, "row", 1.0), HERE, arguments=2**40, temporaries=1)
    assert not report.fits and report.total == 2**40 + 1
    assert report.flops is report.cycles is report.compile_seconds is None
