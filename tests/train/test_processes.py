"""Runs in processes of their own: killed at random moments, and spread over two processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
KILLS = 2
pytestmark = pytest.mark.slow


def start(workdir, cache, *, mesh="1,1,1", devices=8, **environment):
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(HERE / "train_and_wait.py"), str(workdir), str(cache), mesh],
        env={**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(workdir, cache, mesh):
    """Two processes with four devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        start(
            workdir,
            cache,
            mesh=mesh,
            devices=4,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]


def finish(process):
    """Steps and digest that the process printed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.splitlines()[-1].split()


def newest(workdir):
    return max([int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()], default=0)


def wait_for_checkpoint(process, workdir):
    """Waits for a checkpoint beyond those there were."""
    before = newest(workdir)
    while newest(workdir) <= before and process.poll() is None:
        time.sleep(0.01)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_killed_runs_end_with_the_same_bits(tmp_path, program_cache):
    expected = finish(start(tmp_path / "alone", program_cache))
    assert expected[0] == "15"
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    workdir = tmp_path / "killed"
    for _ in range(KILLS):
        process = start(workdir, program_cache)
        wait_for_checkpoint(process, workdir)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert newest(workdir) < 15, f"finished before it was killed (seed {seed})"
    assert finish(start(workdir, program_cache)) == expected, f"seed {seed}"
    assert [row["step"] for row in rows(workdir)] == [1, 3, 6, 9, 12, 15], f"seed {seed}"


def test_two_processes_train_as_one(tmp_path, program_cache):
    """The same losses; SIGTERM to one stops both after the same step; either number of processes goes on."""
    finish(start(tmp_path / "one", program_cache, mesh="2,2,2"))
    workdir = tmp_path / "two"
    both = start_two(workdir, program_cache, "2,2,2")
    wait_for_checkpoint(both[0], workdir)
    both[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in both]
    assert ends[0] == ends[1]
    assert 2 <= int(ends[0][0]) < 15
    assert newest(workdir) == int(ends[0][0])
    assert finish(start(workdir, program_cache, mesh="2,2,2"))[0] == "15"
    want = {row["step"]: row["loss"] for row in rows(tmp_path / "one")}
    got = {row["step"]: row["loss"] for row in rows(workdir)}
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[step] for step in want], list(want.values()), rtol=1e-5)
