"""A run's directory: the same run resumes, another one is refused, nothing is overwritten."""

import dataclasses
import json
from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.config import Config, MeshConfig, ModelSettings, TrainConfig, read_config
from cft_jax.runs.workdir import MAY_CHANGE, check_workdir, setting_up


def opened(path, config, mistake="", tasks=""):
    with setting_up(Workdir(path), config, devices="cpu", write=True, tasks=tasks):
        (path / "base").mkdir(exist_ok=True)
        if mistake:
            raise UserError(mistake)


def test_records_the_whole_config_with_versions(tmp_path):
    opened(tmp_path / "run", Config(seed=3))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["seed"] == 3
    assert saved["config"]["model"]["lora"]["rank"] == 16
    assert saved["versions"]["jax"] and saved["revision"] and saved["devices"] == "cpu"


def test_goes_on_where_only_free_fields_differ(tmp_path):
    opened(tmp_path, Config())
    opened(tmp_path, Config(mesh=MeshConfig(tensor=2), train=TrainConfig(max_steps=7)))
    assert read_config(tmp_path)["train"]["max_steps"] == 7


def test_nothing_is_left_of_a_run_that_could_not_be_set_up(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("new", "empty"):
        with pytest.raises(UserError, match="too long"):
            opened(tmp_path / place, Config(seed=3), mistake="too long")
        assert check_workdir(Workdir(tmp_path / place), Config(seed=4))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_run_that_makes_the_base_outlasts_a_mistake(tmp_path):
    config = Config(model=ModelSettings(base="world"))
    with pytest.raises(UserError, match="too long"):
        opened(tmp_path / "run", config, mistake="too long")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["base"]
    assert check_workdir(Workdir(tmp_path / "run"), config), "the next try begins with it"
    with pytest.raises(UserError, match="not empty"):
        check_workdir(Workdir(tmp_path / "run"), Config())


def test_a_record_that_another_process_is_writing(tmp_path, monkeypatch):
    listed = Path.iterdir

    def slowly(path):
        found = list(listed(path))
        monkeypatch.undo()
        opened(path, Config())
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", slowly)
    (tmp_path / ".config.json.x1").touch()
    assert not check_workdir(Workdir(tmp_path), Config())


def test_a_run_that_cannot_go_on_keeps_its_record(tmp_path):
    opened(tmp_path, Config())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="no such mesh"):
        opened(tmp_path, Config(mesh=MeshConfig(tensor=3)), mistake="no such mesh")
    assert (tmp_path / "config.json").read_bytes() == before
    assert (tmp_path / "base").exists()
    assert not check_workdir(Workdir(tmp_path), Config())


def test_a_run_goes_on_with_the_tasks_that_it_began_with(tmp_path, caplog):
    opened(tmp_path, Config())  # a run of an older version, which did not record them
    opened(tmp_path, Config(), tasks="a" * 64)
    assert caplog.text.count("does not record what it trained on") == 1
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"other prompts or distributions to train on \(digest aaaaaaaaaaaa, now bbbb"):
        opened(tmp_path, Config(), tasks="b" * 64)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/run"):
        with pytest.raises(UserError, match="name a"):
            opened(tmp_path / place, Config())


def test_refuses_another_run_and_names_the_fields(tmp_path):
    opened(tmp_path, Config())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"seed was 11 and is 12.*train\.tau was 1\.0 and is 2\.0"):
        opened(tmp_path, Config(seed=12, train=TrainConfig(tau=2.0)))
    assert (tmp_path / "config.json").read_bytes() == before


def test_refuses_a_directory_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        opened(tmp_path, Config())


def test_a_damaged_record_is_said(tmp_path):
    for text in ('{"config": {', '{"config": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            opened(tmp_path, Config())


def test_the_free_fields_exist():
    values = dataclasses.asdict(Config())
    for name in MAY_CHANGE:
        value = values
        for part in name.split("."):
            value = value[part]
