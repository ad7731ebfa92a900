"""The Colab notebook, its cells in order in one process, on the CPU with the demo config made short."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "launch" / "colab_tpu.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHORT = [
    *("train.max_steps=2", "train.batch_size=16", "log.every_steps=1", "data.train_families=uniform,"),
    *("eval.max_prompts_per_split=1", "eval.num_samples=4", "suite.questions.num_questions=14"),
    *(f"model.base={ROOT / 'tests' / 'configs' / 'tiny.py'}", "train.keep.weight=0"),
]


def run_cells(cells, parameters):
    """Runs cells as a kernel does; `parameters` replaces values of the cell tagged so, as papermill does."""
    namespace = {}
    for index, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {index}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= namespace.keys()
            namespace.update(parameters)
    return namespace


@pytest.fixture
def display(monkeypatch):
    """IPython's display, which is not installed here: takes PNG images and keeps them."""
    shown = []

    class Image:
        def __init__(self, *, data):
            assert data.startswith(b"\x89PNG")

    module = types.ModuleType("IPython.display")
    module.Image, module.display = Image, shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


@pytest.fixture
def checkout(tmp_path, monkeypatch, program_cache):
    """A directory that looks like a checkout, in which the notebook may leave what it makes."""
    for name in ("cft_jax", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "launch").mkdir()
    monkeypatch.chdir(tmp_path / "launch")
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(program_cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


@pytest.mark.slow
def test_runs_from_top_to_bottom(checkout, display, capsys):
    run_cells(CODE, {"CONFIG": "configs/demo.py", "WORKDIR": "runs/demo", "OVERRIDES": SHORT})
    out = capsys.readouterr().out
    assert "devices:  1 x cpu" in out and "versions: Python" in out
    assert "nothing to download" in out and "train" in out and "exact total_variation" in out
    assert {"config.json", "model.safetensors"} <= {path.name for path in (checkout / "runs/demo-exported").iterdir()}
    assert len(display) == 2


def test_saved_without_outputs_and_with_an_open_model():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    namespace = {}
    (cell,) = [cell for cell in CODE if "parameters" in cell["metadata"].get("tags", ())]
    exec("".join(cell["source"]), namespace)
    assert namespace["CONFIG"].startswith("configs/qwen3.py")
    # Before it, only the look at what is here.
    assert CODE.index(cell) == 1 and "find_devices" in "".join(CODE[0]["source"])


@pytest.mark.parametrize(("platform", "held"), [("tpu", True), ("cpu", False)])
def test_a_jax_that_sees_the_device_is_held(checkout, monkeypatch, platform, held):
    """What pip is asked for where cft_jax is missing."""
    import importlib.util
    import subprocess

    found = {"platform": platform, "kind": "TPU v5e", "count": 1, "bytes": 2**34}
    asked = []

    def pip(command, **options):
        if "pip" in command:
            asked.append((command, Path(command[command.index("-c") + 1]).read_text()))
            return subprocess.CompletedProcess(command, 0)
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found) + "\n", stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cft_jax" else find_spec(name))
    namespace = run_cells(CODE[:3], {})
    ((command, constraints),) = asked
    assert command[-2:] == ["-e", "."]
    names = [name for name in ("jax", "jaxlib", "libtpu") if held and namespace["version"](name)]
    assert constraints == "".join(f"{name}=={namespace['version'](name)}\n" for name in names)


def test_a_gated_model_stops_before_anything_heavy(checkout, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    class Refusal(GatedRepoError):
        def __init__(self):
            Exception.__init__(self, "401")

    def refuse(repo, filename):
        raise Refusal

    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "from the secrets")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(RuntimeError, match=r"gated: accept its licence at https://huggingface.co/meta-llama/.*qwen3"):
        run_cells(CODE[:4], {"CONFIG": "configs/llama.py:1b", "OVERRIDES": []})
    # Colab hands a secret to the kernel alone; what trains is another process.
    assert os.environ["HF_TOKEN"] == "from the secrets"


def test_a_mistake_in_the_settings_is_told_at_once(checkout):
    with pytest.raises(RuntimeError, match="batch_size"):
        run_cells(CODE[:4], {"CONFIG": "configs/demo.py", "OVERRIDES": ["train.batch_sise=3"]})
