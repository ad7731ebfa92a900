"""The console script, shipped configs by their names, and the wheel that brings both."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cft_jax
from cft_jax import __main__ as console
from cft_jax.common.errors import UserError
from cft_jax.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cft_jax_command(monkeypatch, capsys, log_restored):
    """Runs the console script in this process; returns exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cft-jax", *words])
        code = 0
        try:
            console.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_one_command_for_all(cft_jax_command):
    assert {"main", "sample", "prepare", "export", "compare", "evaluate"} <= console.commands().keys()
    assert cft_jax_command("--version") == (0, f"cft_jax {cft_jax.__version__}\n", "")
    for words in ([], ["--help"]):
        code, out, _ = cft_jax_command(*words)
        assert code == 0 and "  sample    Asks a model" in out and "  evaluate  Measures a model" in out
    for name in ("export", "evaluate"):
        code, out, _ = cft_jax_command(name, "--help")
        assert code == 0 and f"python -m cft_jax.{name}" in out
    assert cft_jax_command("export")[::2] == (
        2,
        "error: --workdir and --output are needed: the run's directory, and a new one for its weights\n",
    )
    assert cft_jax_command("exprot")[::2] == (2, "error: unknown command 'exprot'; did you mean export?\n")


def test_shipped_configs_go_by_their_names(tmp_path, monkeypatch):
    expected = {name: load_config(str(ROOT / "configs" / f"{name}.py")) for name in ("demo", "eval/structured")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for name, config in expected.items():
        assert load_config(name) == load_config(f"configs/{name}.py") == config
    assert load_config("llama:3b", ["seed=3"]).model.checkpoint == "meta-llama/Llama-3.2-3B-Instruct"
    with pytest.raises(UserError, match="'9b' names none of"):
        load_config("llama:9b")
    for wrong in ("dmeo", "dmeo.py", "", "elsewhere/demo.py", "../demo"):
        with pytest.raises(UserError, match=r"there is no such file; there are custom, demo, eval/all, "):
            load_config(wrong)
    (tmp_path / "demo.py").write_text("raise ValueError('mine')")
    with pytest.raises(UserError, match="mine"):
        load_config("demo.py")


@pytest.mark.slow
def test_the_wheel_brings_all_that_commands_need(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--wheel-dir={tmp_path}", str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob(f"cft_jax-{cft_jax.__version__}-*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (script,) = site.glob("*.dist-info/entry_points.txt")
    assert "cft-jax = cft_jax.__main__:main" in script.read_text()
    files = {
        path.relative_to(ROOT) for path in (ROOT / "cft_jax").rglob("*") if path.suffix in (".py", ".txt", ".html")
    }
    assert [path for path in files if not (site / path).exists()] == []
    empty.mkdir()
    code = "from cft_jax.config import load_config as load; "
    code += "print(load('demo').data.num_decimals, load('custom').data.custom)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert found.stdout == f"1 {site}/cft_jax/configs/custom.jsonl\n", found.stderr
    assert (site / "cft_jax" / "configs" / "custom.jsonl").is_file()
