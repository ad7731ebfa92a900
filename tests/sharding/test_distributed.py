"""Which processes an environment describes, and what is said when they do not meet."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.sharding.distributed import find_processes, metadata_workers

ROOT = Path(__file__).parents[2]
NAMED = {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
# As `srun` sets them for the second task of the second of two machines with four GPUs each.
STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


def named(address, count, index, **more):
    """What JAX is told where nothing is left for it to find out."""
    told = {"coordinator_address": address, "num_processes": count, "process_id": index}
    return told | {"cluster_detection_method": "deactivate"} | more


def test_one_process_needs_nothing():
    assert find_processes(NO_TPU) is None
    assert find_processes({"JAX_PLATFORMS": "cpu"}) is None
    assert find_processes(STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    # The batch script itself, before any srun.
    assert find_processes(NO_TPU | {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "17"}) is None
    assert find_processes(NAMED | {"JAX_NUM_PROCESSES": "1"}) is None
    assert find_processes(NO_TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_named_processes():
    assert find_processes(NAMED) == named("host0:1234", 4, 3)
    pod = {"JAX_COORDINATOR_ADDRESS": "job-0.job:1234", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}
    assert find_processes(pod) == named("job-0.job:1234", 2, 1)


def test_slurm_steps():
    """The address is left to JAX, which reads it off the step's list of machines."""
    step = {"num_processes": 8, "process_id": 5}
    assert find_processes(STEP) == step | {"local_device_ids": (1,)}
    addressed = STEP | {"JAX_COORDINATOR_ADDRESS": "gpu01:1234"}
    assert find_processes(addressed) == named("gpu01:1234", 8, 5, local_device_ids=(1,))
    bound = STEP | {"CUDA_VISIBLE_DEVICES": "3"}
    assert find_processes(bound) == step | {"local_device_ids": (0,)}
    # One task per machine takes all of its GPUs.
    whole = STEP | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "4"}
    assert find_processes(whole) == {"num_processes": 2, "process_id": 1, "local_device_ids": (0, 1, 2, 3)}


def test_tpu_pods_are_left_to_jax():
    assert find_processes({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}) == {}
    assert find_processes({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == {}
    assert find_processes({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID must be set too"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS must be set too"),
        ({"JAX_COORDINATOR_ADDRESS": "host0"}, "must be host:port"),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four'"),
    ],
)
def test_contradictions_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        find_processes(NAMED | changes)


@pytest.fixture
def metadata():
    """A metadata server that lists what is put into the list, by the path that Google documents."""
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
            known = self.path == wanted and self.headers["Metadata-Flavor"] == "Google" and answers
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers[0].encode() if known else b"")

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, answers
        server.shutdown()
        thread.join()


def test_metadata_of_tpu_vms(metadata):
    environment, answers = metadata
    assert metadata_workers(environment) == 1  # no such attribute: not a TPU VM
    answers.append("10.0.0.2,10.0.0.3")
    assert metadata_workers(environment) == 2
    answers[0] = "unknown:0:10.0.0.2"  # the older form, one machine
    assert metadata_workers(environment) == 1
    assert metadata_workers({"GCE_METADATA_IP": "127.0.0.1:1"}) == 1  # nobody answers: Colab


@pytest.mark.parametrize(
    ("index", "exit_code", "words"),
    [
        # 75: worth another attempt.
        (0, 75, "process 0 of 2): not all came within 1 s"),
        pytest.param(1, 75, "process 1 of 2): not all came within 1 s", marks=pytest.mark.slow),
        (2, 2, "process_id=2, num_processes=2"),
    ],
)
def test_processes_that_do_not_meet_are_one_sentence(index, exit_code, words):
    """Neither the coordinator nor another process waits for ever, or dies with a stack trace."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = "from cft_jax.common import cli; from cft_jax.sharding import distributed\n"
    code += "cli.run(lambda values: distributed.start(), cli.new_flags(config=False), '')"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
        "CFT_START_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code, done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert words in said and (address in said or exit_code == 2)
    assert "Traceback" not in done.stderr
