"""Files are whole or absent."""

import json
import os

import pytest

from cft_jax.common.files import write_atomically, write_json


def test_replaces_the_content_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_refuses_what_json_has_not(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    write_json(tmp_path / "b.json", {"x": 0.1})
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": 0.1}
    assert not (tmp_path / "a.json").exists()
