"""What a user sees of a command: help, one line per mistake, exit codes."""

import errno
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.config import config_name, config_of

ROOT = Path(__file__).parents[2]
CONFIG = """
from cft_jax.config import default_config_dict


def get_config(arg=""):
    config = default_config_dict()
    config.model.checkpoint = arg
    return config
"""


@pytest.fixture(autouse=True)
def quietly(log_restored):
    """Commands set up logging."""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    (tmp_path / "other.py").write_text("\n\ndef get_config():\n    return 1 + None\n")
    (tmp_path / "broken.py").write_text("\nthis is no Python\n")
    (tmp_path / "lost.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "notes.md").write_text("# Notes\n")
    (tmp_path / "picky.py").write_text("def get_config(arg=''):\n    raise ValueError(f'no model {arg!r}')\n")
    return path


def run(main, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prog", *args])
        run_as_called(main)


def run_as_called(main):
    values = cli.new_flags(config=True)
    flags.DEFINE_string("workdir", "", "Where.", flag_values=values)
    cli.run(main, values, "Does the work.")


def exit_of(capsys, main, *args):
    with pytest.raises(SystemExit) as stopped:
        run(main, *args)
    out = capsys.readouterr()
    return stopped.value.code, out.out, out.err


def test_main_sees_config_and_overrides(config_file):
    seen = {}

    def main(values):
        seen.update(config=config_of(values), name=config_name(values))

    run(
        main,
        f"--config={config_file}:some/dir",
        "--config.train.batch_size=8",
        "--config.model.lora.targets=q_proj,v_proj",
    )
    assert seen["config"].model.checkpoint == "some/dir"
    assert seen["config"].train.batch_size == 8
    assert seen["config"].model.lora.targets == ("q_proj", "v_proj")
    assert seen["name"] == "mine-some-dir"


def test_overrides_may_be_written_as_absl_writes_flags(config_file):
    seen = []
    words = [
        "-config.mesh.fsdp",
        "-1",
        "--config.mesh.data=1",
        "--noconfig.eval.enabled",
        "--config.log.wandb",
        "--config.seed",
        "3",
    ]
    run(lambda values: seen.append(config_of(values)), *words, "--config", f"{config_file}:m")
    assert (seen[0].mesh.fsdp, seen[0].eval.enabled, seen[0].log.wandb, seen[0].seed) == (-1, False, True, 3)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--config is missing"]),
        (["--config=nowhere.py"], ["nowhere.py", "no such file"]),
        (["--config", "{near}"], ["mien.py", "no such file", "mine.py, "]),
        (["--config={text}"], ["notes.md", "is no config"]),
        (["--config={broken}"], ["broken.py, line 2", "SyntaxError"]),
        (["--config={lost}"], ["lost.py, line 1", "ModuleNotFoundError", "nowhere_to_be_found"]),
        (["{file}"], ["unexpected argument", "did you mean --config={file}?"]),
        (["--config={file}", "--config.train.batchsize=2"], ["batchsize", "batch_size"]),
        (["--config={file}", "--config.train.batch_size=many"], ["batch_size", "many"]),
        (["--config={file}", "--wrkdir=x"], ["wrkdir", "workdir"]),
        (["--config={file}", "stray"], ["stray"]),
        (["--config={file}", "--quiet", "--verbose"], ["--quiet", "--verbose", "exclude"]),
        (["--config={other}:3b"], ["other.py:3b", "takes no argument"]),
        (["--config={other}"], ["other.py, line 4", "TypeError"]),
        (["--config={picky}:9b"], ["picky.py:9b: no model '9b'"]),
        (["--config={file}:m", "--config.train.tau=-1", "--config.mesh.data=0"], ["train.tau=-1.0", "config.mesh"]),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(capsys, config_file, args, words):
    def main(values):
        config_of(values)

    names = {"file": "mine", "other": "other", "picky": "picky", "near": "mien", "broken": "broken", "lost": "lost"}
    files = {key: config_file.with_name(f"{name}.py") for key, name in names.items()}
    files["text"] = config_file.with_name("notes.md")
    code, out, err = exit_of(capsys, main, *[arg.format(**files) for arg in args])
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word.format(**files) in err


def test_help_lists_flags_and_exits_with_0(capsys):
    code, out, _ = exit_of(capsys, lambda values: None, "--help")
    assert code == 0
    assert "Does the work." in out and "--workdir: Where." in out
    assert "docs/config.md" in out and "Exit codes: 0 done" in out


@pytest.mark.parametrize("name", ["main", "prepare", "evaluate", "export", "compare"])
def test_every_command_explains_itself(capsys, monkeypatch, name):
    module = f"cft_jax.{name}"
    place = f"{module}.__main__" if name == "evaluate" else module
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(place).main()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python -m {module} " in out  # an example
    undocumented = [line for line in out.splitlines() if line.startswith("  --") and line.endswith(":")]
    assert not undocumented and "--args" not in out


def test_a_message_of_several_lines_is_folded(capsys, config_file):
    def main(values):
        raise UserError("first\n  second")

    _, _, err = exit_of(capsys, main, f"--config={config_file}")
    assert err == "error: first second\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/metrics.jsonl"), ["/full/metrics", "free some space"]),
        (PermissionError(errno.EACCES, "Permission denied", "/locked/x"), ["/locked/x", "may read and write"]),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9"), ["mesh.fsdp", "allocating 9"]),
        (MemoryError("no 9 GiB"), ["out of memory", "JAX_PLATFORMS=cpu", "no 9 GiB"]),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_code_2(capsys, config_file, error, words):
    def main(values):
        raise error

    code, _, err = exit_of(capsys, main, f"--config={config_file}")
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_our_own_mistakes_keep_their_stack_trace(config_file):
    def main(values):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, f"--config={config_file}")


def test_quiet_and_verbose_choose_what_is_logged(tmp_path):
    program = tmp_path / "prog.py"
    program.write_text(
        "from absl import logging\nfrom cft_jax.common import cli\n"
        "def main(values):\n    logging.info('detail')\n    logging.warning('care')\n"
        "cli.run(main, cli.new_flags(config=False), 'x')\n"
    )

    def stderr(*args):
        return subprocess.run([sys.executable, program, *args], capture_output=True, text=True, check=True).stderr

    assert stderr() == "detail\nwarning: care\n"
    assert stderr("--quiet") == "warning: care\n"
    assert "detail" in stderr("--verbose")


# Seconds of imports each; none is needed to say what a flag is or that a value is impossible.
SLOW_TO_IMPORT = ("flax", "jax", "matplotlib", "numpy", "orbax", "scipy.stats", "transformers")
AT_ONCE = """
import runpy, sys

mistake = ["--config=configs/demo.py", "--config.train.tau=-1"]
arguments = {"main": mistake, "evaluate": mistake, "prepare": [*mistake, "--output=x"], "export": [], "compare": []}
for name, mistaken in arguments.items():
    for sys.argv in ([name, "--help"], [name, *mistaken]):
        try:
            runpy.run_module(f"cft_jax.{name}", run_name="__main__")
        except SystemExit as ended:
            sys.stderr.write(f"{ended.code}\\n")
sys.stderr.write(f"{sorted(set(SLOW) & set(sys.modules))}\\n")
"""


def test_help_and_mistakes_answer_before_anything_slow_is_imported():
    program = f"SLOW = {SLOW_TO_IMPORT!r}{AT_ONCE}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    *lines, slow = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("error: ")] == ["0", "2"] * 5
    assert sum("config.train.tau=-1.0" in line for line in lines) == 3
    assert slow == "[]"
