"""A run that first makes the model it begins with, by another config: made once, resumed, its mistakes told."""

import json
import shutil
from pathlib import Path

import pytest
from flax import nnx

from cft_jax.checkpoints import save_pretrained
from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir, opened
from cft_jax.config import changed
from cft_jax.distributions import configured_tasks
from cft_jax.jobs.prepare import prepare_data
from cft_jax.main import run
from cft_jax.models.layers import Lora
from cft_jax.runs.base import base_of_run, load_model
from cft_jax.runs.scratch import make_base
from cft_jax.runs.workdir import setting_up
from cft_jax.sharding.mesh import make_mesh

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
FEW_STEPS = ("train.max_steps=2", "eval.enabled=False", "model.scratch.enabled=False", "model.lora.enabled=True")


@pytest.fixture
def calibration(configured, monkeypatch, tmp_path):
    """The configuration of a short run of adapters that begins with what another config makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda base, *overrides: configured(TINY, *FEW_STEPS, f"model.base={base}", *overrides)


@pytest.mark.slow
@pytest.mark.usefixtures("program_cache")
def test_the_base_is_made_first_and_resumed_where_it_was_killed(calibration, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = run(calibration(TINY), whole)
    assert summary["checkpoint"] == str(whole / "base" / "export") and summary["step"] == 2
    assert not (whole / "base" / "eval").exists(), "the run itself measures its base"
    # As a kill in the base's training leaves it: the checkpoint of step 3 of 6, and nothing of what follows.
    shutil.copytree(whole, killed)
    for name in ("checkpoints", "export", "base/export", "base/checkpoints/6"):
        shutil.rmtree(killed / name)
    for name in ("metrics.jsonl", "summary.json", "report.html", "base/summary.json", "base/report.html"):
        (killed / name).unlink()
    assert run(calibration(TINY), killed)["step"] == 2
    for name in ("base/export/model.safetensors", "export/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    made = (killed / "base" / "export" / "model.safetensors").stat().st_mtime_ns
    assert run(calibration(TINY, "train.max_steps=3"), killed)["step"] == 3
    assert (killed / "base" / "export" / "model.safetensors").stat().st_mtime_ns == made
    shutil.rmtree(killed / "base")
    with pytest.raises(UserError, match="base/export is gone, the base model"):
        base_of_run(calibration(TINY), Workdir(killed))


def test_an_adapter_names_the_place_of_its_base_on_a_store(configured, bucket, tmp_path):
    config = configured(TINY)
    tasks = [task for split in configured_tasks(config.data).values() for task in split]
    adapters = changed(config, {"model": {"scratch": {"enabled": False}, "lora": {"enabled": True}}})
    with opened("gs://bucket/run", write=True) as workdir:
        make_base(workdir.path / "base", config, tasks)
        model = load_model(adapters, str(workdir.path / "base"), make_mesh(), workdir)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Lora):
                module.b.set_value(module.b[...] + 1)
        save_pretrained(model, tmp_path / "adapter", format="adapter")
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "gs://bucket/run/base"


def test_data_are_prepared_with_the_tokenizer_that_the_base_will_have(calibration, tmp_path, configured):
    prepared, _ = prepare_data(calibration(TINY))
    assert prepared["prefixes"] == prepare_data(configured(TINY))[0]["prefixes"]


def test_mistakes_in_the_base_are_told_and_leave_nothing(calibration, tmp_path):
    adapter = tmp_path / "adapter.py"
    adapter.write_text(
        "from cft_jax.config import default_config_dict\n"
        "def get_config():\n"
        "    config = default_config_dict()\n"
        "    config.model.checkpoint = 'some/model'\n"
        "    return config\n"
    )
    for base, words in (
        ("wrold", "config.model.base=wrold: --config=wrold: there is no such file"),
        (adapter, "exports no whole model; set export.enabled=True and export.format=merged there"),
    ):
        with pytest.raises(UserError, match=words):
            run(calibration(base), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_mistakes_in_what_is_kept_are_told_before_the_base_is_made(calibration, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("source", "prompts"):
        with pytest.raises(UserError, match=f"train.keep.{name}"):
            run(
                calibration(TINY, "train.keep.weight=0.1", f"train.keep.{name}={tmp_path}/none.jsonl"), tmp_path / "run"
            )
    assert "first the base model" not in caplog.text


def test_a_base_of_another_config_is_not_taken(calibration, tmp_path, configured):
    base = configured(TINY, "seed=3", "data.cache_dir=")
    with setting_up(Workdir(tmp_path / "run" / "base"), base, devices="cpu", write=True):
        (tmp_path / "run" / "base" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"run/base holds a run of another config: .*seed was 3 and is 11"):
        run(calibration(TINY), tmp_path / "run")
    assert (tmp_path / "run" / "base" / "summary.json").exists()
