"""Workdirs on object stores: a store that is a directory, reached by epath under gs:// names."""

import json
import shutil
from pathlib import Path

import pytest
from etils import epath

from cft_jax.common import mirror
from cft_jax.common.errors import UserError
from cft_jax.common.mirror import checkpoint_directory, local_workdir, publish, refresh
from cft_jax.common.writer import MetricsWriter, read_metrics


def test_files_reach_the_store_and_come_back(bucket):
    with local_workdir("gs://bucket/runs/a", write=True) as workdir:
        assert workdir.name == "a" and not workdir.exists()
        (workdir / "eval" / "x").mkdir(parents=True)
        (workdir / "config.json").write_text("1")
        (workdir / "eval" / "x" / "summary.json").write_text("2")
        (workdir / ".summary.json.tmp").write_text("half")
        publish(workdir / "config.json")
        assert (bucket / "runs/a/config.json").read_text() == "1"
        (workdir / "config.json").write_text("one")
        (workdir / "eval" / "x" / "summary.json").unlink()
    assert not workdir.exists()
    assert {path.name for path in (bucket / "runs/a").rglob("*") if path.is_file()} == {"config.json"}
    (bucket / "runs/a/checkpoints/3").mkdir(parents=True)
    (bucket / "runs/a/checkpoints/3/array").write_text("large")
    with local_workdir("gs://bucket/runs/a", write=False) as workdir:
        assert (workdir / "config.json").read_text() == "one"
        # Checkpoints stay where they are.
        assert not (workdir / "checkpoints").exists()
        place = checkpoint_directory(workdir)
        assert str(place) == "gs://bucket/runs/a/checkpoints" and (place / "3" / "array").exists()
        (workdir / "config.json").write_text("not this process's to write")
    assert (bucket / "runs/a/config.json").read_text() == "one"


def test_what_a_failed_start_removes_is_removed_there(bucket):
    with pytest.raises(UserError), local_workdir("gs://bucket/b", write=True) as workdir:
        workdir.mkdir()
        (workdir / "config.json").write_text("1")
        publish(workdir)
        shutil.rmtree(workdir)
        raise UserError("a mistake")
    assert not (bucket / "b/config.json").exists()


def test_another_process_fetches_what_was_published(bucket):
    with local_workdir("gs://bucket/c", write=True) as first, local_workdir("gs://bucket/c", write=False) as second:
        (first / "base").mkdir(parents=True)
        (first / "base" / "tokenizer.json").write_text("t")
        publish(first / "base")
        refresh(second / "base")
        assert (second / "base" / "tokenizer.json").read_text() == "t"


def test_metrics_are_there_before_the_checkpoint_they_belong_to(bucket):
    with local_workdir("gs://bucket/d", write=True) as workdir:
        writer = MetricsWriter(workdir / "metrics.jsonl", after_step=0, enabled=True)
        writer.write(1, {"loss": 2.0})
        writer.sync()
        assert read_metrics(bucket / "d/metrics.jsonl") == [{"step": 1, "loss": 2.0}]
        writer.close()


def test_the_thread_copies_now_and_then(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "_PUSH_SECONDS", 0.01)
    with local_workdir("gs://bucket/e", write=True) as workdir:
        workdir.mkdir()
        (workdir / "log").write_text("1")
        while not (bucket / "e/log").exists():
            pass


def test_local_places_are_left_alone(tmp_path):
    with local_workdir(str(tmp_path / "run"), write=True) as workdir:
        assert workdir == tmp_path / "run"
        publish(workdir)
        refresh(workdir)
        assert checkpoint_directory(workdir) == epath.Path(tmp_path / "run" / "checkpoints")


def test_mistakes(monkeypatch):
    # Neither gcsfs nor any other client of Google's is installed.
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"--workdir=gs://b/x needs .*\[gcs\]"), local_workdir("gs://b/x", write=True):
        pass


@pytest.mark.usefixtures("program_cache", "log_restored")
def test_a_run_on_a_store_resumes(tmp_path, configured, monkeypatch, capsys):
    """The main job, interrupted and resumed from nothing but the store. Its address is local: tensorstore knows gs://
    by itself, and only with a network."""
    from cft_jax import export
    from cft_jax.main import run

    tiny = Path(__file__).parents[1] / "configs" / "tiny.py"
    monkeypatch.setattr(mirror, "is_remote", lambda place: True)
    store = tmp_path / "store" / "run"
    places = []
    for steps in (2, 4):
        config = configured(tiny, f"train.max_steps={steps}", "eval.enabled=False", "export.enabled=False")
        with local_workdir(str(store), write=True) as workdir:
            assert run(config, workdir)["step"] == steps
            assert not (workdir / "checkpoints").exists()
            places.append(workdir)
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
