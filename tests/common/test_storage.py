"""Workdirs on object stores: a store that is a directory, reached by epath under gs:// names."""

import json
import shutil
from pathlib import Path

import pytest
from etils import epath

from cft_jax.common import storage
from cft_jax.common.errors import UserError
from cft_jax.common.storage import opened
from cft_jax.common.writer import read_metrics


def test_files_reach_the_store_and_come_back(bucket):
    with opened("gs://bucket/runs/a", write=True) as run:
        workdir = run.path
        assert str(run) == "gs://bucket/runs/a" and workdir.name == "a" and not workdir.exists()
        (workdir / "eval" / "x").mkdir(parents=True)
        (workdir / "config.json").write_text("1")
        (workdir / "eval" / "x" / "summary.json").write_text("2")
        (workdir / ".summary.json.tmp").write_text("half")
        run.publish()
        assert (bucket / "runs/a/config.json").read_text() == "1"
        (workdir / "config.json").write_text("one")
        (workdir / "eval" / "x" / "summary.json").unlink()
    assert not workdir.exists()
    assert {path.name for path in (bucket / "runs/a").rglob("*") if path.is_file()} == {"config.json"}
    (bucket / "runs/a/checkpoints/3").mkdir(parents=True)
    (bucket / "runs/a/checkpoints/3/array").write_text("large")
    with opened("gs://bucket/runs/a", write=False) as run:
        assert (run.path / "config.json").read_text() == "one"
        # Checkpoints stay where they are.
        assert not (run.path / "checkpoints").exists()
        assert str(run.checkpoints) == "gs://bucket/runs/a/checkpoints"
        assert (run.checkpoints / "3" / "array").exists()
        (run.path / "config.json").write_text("not this process's to write")
        run.publish()
    assert (bucket / "runs/a/config.json").read_text() == "one"


def test_what_a_failed_start_removes_is_removed_there(bucket):
    with pytest.raises(UserError), opened("gs://bucket/b", write=True) as run:
        run.path.mkdir()
        (run.path / "config.json").write_text("1")
        run.publish()
        shutil.rmtree(run.path)
        raise UserError("a mistake")
    assert not (bucket / "b/config.json").exists()


def test_another_process_fetches_what_was_published(bucket):
    with opened("gs://bucket/c", write=True) as first, opened("gs://bucket/c", write=False) as second:
        (first.path / "base").mkdir(parents=True)
        (first.path / "base" / "tokenizer.json").write_text("t")
        first.publish()
        second.fetch("base")
        assert (second.path / "base" / "tokenizer.json").read_text() == "t"


def test_the_thread_copies_now_and_then(bucket, monkeypatch):
    monkeypatch.setattr(storage, "_PUSH_SECONDS", 0.01)
    with opened("gs://bucket/e", write=True) as run:
        run.path.mkdir()
        (run.path / "log").write_text("1")
        while not (bucket / "e/log").exists():
            pass


def test_local_places_are_left_alone(tmp_path):
    with opened(str(tmp_path / "run"), write=True) as run:
        assert run.path == tmp_path / "run" and str(run) == str(tmp_path / "run")
        run.publish()
        run.fetch()
        assert run.checkpoints == epath.Path(tmp_path / "run" / "checkpoints")
    assert not list(tmp_path.iterdir())


def test_mistakes(monkeypatch):
    # Neither gcsfs nor any other client of Google's is installed.
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"--workdir=gs://b/x needs .*\[gcs\]"), opened("gs://b/x", write=True):
        pass


@pytest.mark.usefixtures("program_cache", "log_restored")
def test_a_run_on_a_store_resumes(tmp_path, configured, monkeypatch, capsys):
    """The main job, interrupted and resumed from nothing but the store. Its address is local: tensorstore knows gs://
    by itself, and only with a network."""
    from cft_jax import export
    from cft_jax.jobs.calibrate import run

    tiny = Path(__file__).parents[1] / "configs" / "tiny.py"
    monkeypatch.setattr(storage, "is_remote", lambda place: True)
    store = tmp_path / "store" / "run"
    places = []
    for steps in (2, 4):
        config = configured(tiny, f"train.max_steps={steps}", "eval.enabled=False", "export.enabled=False")
        with opened(str(store), write=True) as workdir:
            assert run(config, workdir)["step"] == steps
            assert not (workdir.path / "checkpoints").exists()
            places.append(workdir.path)
    assert places[0] != places[1] and not any(place.exists() for place in places)
    assert json.loads((store / "summary.json").read_text())["step"] == 4
    assert [row["step"] for row in read_metrics(store / "metrics.jsonl")] == [1, 2, 4]
    assert sorted(path.name for path in (store / "checkpoints").iterdir() if path.name.isdigit()) == ["3", "4"]
    monkeypatch.setattr("sys.argv", ["export", f"--workdir={store}", f"--output={store.parent / 'exported'}"])
    export.main()
    assert {"model.safetensors", "README.md"} <= {path.name for path in (store.parent / "exported").iterdir()}
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 2 and "exported exists and is not empty" in capsys.readouterr().err
