"""The paper's grid: what it holds, what it takes for done, what it runs."""

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from cft_jax.config import validate

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.py"


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "sweep", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def written(sweep, capsys, *arguments):
    assert sweep.main(["--root=runs", *arguments]) == 0
    return capsys.readouterr().out


def test_the_grid_is_the_papers(sweep, configured):
    """Twelve models, soft and hard; every command's config is one that the main job takes."""
    from cft_jax.models.families import PUBLISHED

    runs = list(sweep.grid("runs", [], []))
    assert len({run.name for run in runs}) == len(runs) == 24
    found = set()
    for run in runs:
        config = configured(ROOT / run.flags[0].removeprefix("--config="))
        found.add((config.model.checkpoint, config.data.target, config.data.max_bins))
        assert run.flags[1] == f"--workdir=runs/{run.name}"
        assert run.name.endswith(config.data.target)
    assert found == {(name, *target) for name in PUBLISHED for target in (("soft", 1001), ("hard", 16384))}


def test_settings_multiply_and_reach_the_command(sweep, capsys, configured):
    out = written(
        sweep,
        capsys,
        "--print",
        "--only=llama-3b-hard*",
        "--set=seed=11,12",
        "--set=data.space=grid,full",
        "--",
        "--x=a b",
    )
    lines = [shlex.split(line) for line in out.splitlines()]
    assert len(lines) == 4 and len({line[4] for line in lines}) == 4
    assert lines[-1][:4] == ["python", "-m", "cft_jax.main", "--config=configs/llama.py:3b-hard"]
    assert lines[-1][5:] == ["--config.seed=12", "--config.data.space=full", "--x=a b"]


def test_the_examples_are_commands_that_the_main_job_takes(sweep, capsys, configured):
    """What the docstring shows, printed instead of run; each line's config is read and checked with its overrides."""
    examples = [line.split("#")[0] for line in sweep.__doc__.splitlines() if "sweep.py " in line]
    assert len(examples) == 6 and sum("--set=" in example for example in examples) == 1
    for example in examples:
        words = [word for word in shlex.split(example)[2:] if not word.startswith(("--print", "--run", "--submit"))]
        for line in written(sweep, capsys, *words, "--print").splitlines():
            file, *flags = [word.removeprefix("--config") for word in shlex.split(line)[3:] if "--config" in word]
            validate(configured(ROOT / file.removeprefix("="), *(flag.removeprefix(".") for flag in flags)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only=gpt-5*"], "fits no run"),
        (["--set=seed"], "FIELD=VALUE,VALUE"),
        (["--set=train.seed=11,12"], "unknown field config.train.seed"),
        (["--set=train.tau=1.0,hot"], "config.train.tau='hot' must be a number"),
        (["--run", "--print"], "not allowed with"),
    ],
)
def test_mistakes(sweep, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        sweep.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def fake(name, *, step, total, kl):
    workdir = Path("runs") / name
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text("{}")
    (workdir / "metrics.jsonl").write_text('{"step": 7}\n{"step": 9}\n{"st')
    if total:
        stages = {
            stage: {"test_unseen_params": {"exact": {"kl": value, "total_variation": 0.5}}}
            for stage, value in zip(("before", "after"), kl, strict=True)
        }
        summary = {"step": step, "total_steps": total, "evaluations": {"structured": stages}}
        (workdir / "summary.json").write_text(json.dumps(summary))


def test_table_and_what_is_left(sweep, capsys):
    fake("qwen3-0.6b-soft", step=60, total=60, kl=(4.25, 0.0625))
    fake("qwen3-0.6b-hard", step=0, total=0, kl=())
    out = written(sweep, capsys, "--only=qwen3-0.6b*")
    done, started, counts = out.splitlines()[1:]
    assert done.split()[:3] == ["qwen3-0.6b-soft", "done", "60"] and "4.250 > 0.062" in done
    assert started.split() == ["qwen3-0.6b-hard", "started", "9"]
    assert counts == "1 done, 1 started, 0 to do"
    assert written(sweep, capsys, "--print", "--only=qwen3-0.6b*").count("\n") == 1


def test_runs_are_handed_to_a_launcher(sweep, tmp_path):
    log = tmp_path / "log"
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/usr/bin/env bash\nprintf "%s|" "$@" >>{log}\necho >>{log}\n[[ $2 != *hard ]]\n')
    launcher.chmod(0o755)
    arguments = ["--root=gs://b/runs", "--only=qwen3-0.6b*", f"--submit={launcher} --name {{name}} --"]
    # Neither is done; nothing of the bucket can be read here, which counts as not begun.
    sweep.status = lambda root, run: (sweep.TO_DO, {})
    assert sweep.main(arguments) == 1  # the second failed, after the first was tried
    first, second = [line.split("|") for line in log.read_text().splitlines()]
    assert first[:3] == ["--name", "qwen3-0-6b-soft", "--"]
    assert first[3:5] == ["--config=configs/qwen3.py:0.6b", "--workdir=gs://b/runs/qwen3-0.6b-soft"]
    assert second[1] == "qwen3-0-6b-hard"


@pytest.mark.slow
def test_a_tiny_sweep_goes_on_where_it_stopped(sweep, capfd, monkeypatch, tmp_path, program_cache):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(program_cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    fast = ("--config.train.epochs=1", "--config.eval.enabled=False", "--config.export.enabled=False")
    tiny = sweep.Run("tiny", (f"--config={TINY}", f"--workdir={tmp_path}/runs/tiny", *fast))
    monkeypatch.setattr(sweep, "grid", lambda *_: [tiny])
    assert sweep.main(["--root=runs", "--run"]) == 0
    assert "cft_jax.main" in capfd.readouterr().err
    sweep.main(["--root=runs"])
    assert capfd.readouterr().out.splitlines()[1:] == ["tiny  done           2", "1 done, 0 started, 0 to do"]
    assert sweep.main(["--root=runs", "--run"]) == 0
    assert "cft_jax.main" not in capfd.readouterr().err  # nothing was started
