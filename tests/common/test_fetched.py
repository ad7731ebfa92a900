"""Checkpoints on object stores are copied to the user's cache once, and again where they changed."""

import importlib.machinery
import json
import os
import sys
import types
from types import SimpleNamespace

import pytest

from cft_jax.common import hub, storage
from cft_jax.common.errors import UserError
from cft_jax.text import load_tokenizer
from cft_jax.text.scratch import save_tokenizer, train_tokenizer

ADDRESS = "gs://bucket/models/mine"


@pytest.fixture
def checkpoint(bucket, monkeypatch, tmp_path):
    """A directory on the store that could be a checkpoint; the user's cache is an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = bucket / "models" / "mine"
    place.mkdir(parents=True)
    save_tokenizer(train_tokenizer(["a b c"]), place)
    (place / "model.safetensors").write_bytes(b"weights")
    (place / "pytorch_model.bin").write_bytes(b"pickle")
    (place / "original").mkdir()
    return place


def resolve():
    return hub.resolve(ADDRESS, revision="main", local_files_only=True)[0]


def test_a_checkpoint_is_copied_once_and_again_when_it_changed(checkpoint):
    copy = resolve()
    assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert not {"pytorch_model.bin", "original"} & {path.name for path in copy.iterdir()}
    (copy / "model.safetensors").write_bytes(b"WEIGHTS")  # to see that it is not copied again
    assert resolve() == copy and (copy / "model.safetensors").read_bytes() == b"WEIGHTS"
    (checkpoint / "model.safetensors").write_bytes(b"changed")  # as long as before
    later = (copy / "model.safetensors").stat().st_mtime + 10
    os.utime(checkpoint / "model.safetensors", (later, later))
    (checkpoint / "chat_template.jinja").unlink()
    resolve()
    assert (copy / "model.safetensors").read_bytes() == b"changed"
    assert not (copy / "chat_template.jinja").exists()


def test_a_tokenizer_comes_without_the_weights(checkpoint, tmp_path):
    tokenizer = load_tokenizer(ADDRESS, revision="main", local_files_only=True)
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary.items() <= tokenizer.get_vocab().items()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_an_address_without_a_checkpoint(checkpoint):
    for address in ("gs://bucket/nothing", "gs://bucket/models"):
        with pytest.raises(UserError, match=f"{address}: there is no such directory, or it has none of"):
            hub.resolve(address, revision="main", local_files_only=True)


def test_a_store_that_does_not_answer_is_told_at_once(monkeypatch):
    client = types.ModuleType("gcsfs")
    client.__spec__ = importlib.machinery.ModuleSpec("gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", client)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(storage, "GOOGLE", "http://127.0.0.1:9")  # a port that nobody listens on
    storage.google_answers.cache_clear()
    with pytest.raises(UserError, match=r"--workdir=gs://b/x: http://127\.0\.0\.1:9 does not answer"):
        with storage.reaching("gs://b/x", "--workdir"):
            pytest.fail("the client was asked")
    storage.google_answers.cache_clear()


def test_a_disk_too_small_is_told_before_copying(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
    with pytest.raises(UserError, match=r"0\.0 GiB are free; free some space, or set XDG_CACHE_HOME"):
        resolve()
    assert not (tmp_path / "home").exists()
