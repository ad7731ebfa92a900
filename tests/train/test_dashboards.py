"""What TensorBoard gets is what metrics.jsonl gets."""

import json
import sys

import pytest
from tensorboardX.proto import event_pb2

from cft_jax.common.errors import UserError
from cft_jax.common.writer import MetricsWriter
from cft_jax.config import LogConfig
from cft_jax.train.dashboards import Dashboards


def scalars(directory):
    """(step, name, value) of every scalar in the event files: records of 8 + 4 bytes length, data, 4 bytes checksum."""
    found = []
    for path in sorted(directory.glob("events.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def test_tensorboard_gets_every_row(tmp_path):
    dashboards = Dashboards(LogConfig(tensorboard=True), tmp_path, enabled=True)
    writer = MetricsWriter(tmp_path / "metrics.jsonl", after_step=0, enabled=True, mirror=dashboards.write)
    writer.write(1, {"loss": 0.5, "epoch": 0.25})
    writer.write(10, {"loss": 0.125, "epoch": 2.5})
    writer.close()
    dashboards.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {(row["step"], name, row[name]) for row in rows for name in ("loss", "epoch")}
    assert set(scalars(tmp_path / "tensorboard")) == expected


def test_nothing_is_opened_unasked_or_by_other_processes(tmp_path):
    for log, enabled in ((LogConfig(), True), (LogConfig(tensorboard=True, wandb=True), False)):
        dashboards = Dashboards(log, tmp_path, enabled=enabled)
        dashboards.write(1, {"loss": 1.0})
        dashboards.close()
    assert not list(tmp_path.iterdir())


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Dashboards(LogConfig(wandb=True), tmp_path, enabled=True)
