"""Rows of metrics.jsonl: once each, flushed, cut back on resume."""

import json
import math

import pytest

from cft_jax.common.errors import UserError
from cft_jax.common.writer import MetricsWriter, read_metrics


def written(path, steps, after_step=0):
    writer = MetricsWriter(path, after_step=after_step, enabled=True)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    return writer


def test_rows_are_on_disk_before_close(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = written(path, [1, 10])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 10, "loss": 5.0},
    ]
    writer.close()


def test_resuming_drops_rows_beyond_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 10, 20, 30]).close()
    written(path, [20, 30], after_step=15).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 10, 20, 30]


def test_resuming_drops_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 10]).close()
    with path.open("a") as file:
        file.write('{"step": 20, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 10]
    written(path, [20], after_step=10).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 10, 20]


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_a_step_cannot_stand_twice(tmp_path):
    writer = written(tmp_path / "metrics.jsonl", [1, 10])
    with pytest.raises(ValueError, match="step 10 is not beyond"):
        writer.write(10, {"loss": 1.0})
    writer.close()
    resumed = written(tmp_path / "metrics.jsonl", [], after_step=10)
    with pytest.raises(ValueError, match="step 10 is not beyond"):
        resumed.write(10, {"loss": 1.0})
    resumed.close()


def test_numbers_json_lacks_become_null(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", after_step=0, enabled=True)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None}]


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", after_step=0, enabled=False)
    writer.write(1, {"loss": 1.0})
    writer.sync()
    writer.close()
    assert not (tmp_path / "metrics.jsonl").exists()
