"""The store of finished prompts survives kills and keeps apart what was measured differently."""

import json
import math

import pytest

from cft_jax.common.errors import UserError
from cft_jax.evaluate.store import ResultStore, read_records


def opened(path, fingerprint="f"):
    return ResultStore(path, fingerprint=fingerprint, write=True)


def test_records_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "store.jsonl"
    record = {"split": "s", "task_id": "t", "value": 0.1 + 0.2, "text": "line\u2028break"}
    with opened(path) as store:
        store.append(record)
        assert store["s", "t"] == record
    with opened(path) as store:
        assert ("s", "t") in store and ("s", "u") not in store and len(store) == 1
        assert store["s", "t"] == record
    assert read_records(path, "f") == [record]


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "store.jsonl"
    with opened(path) as store:
        store.append({"split": "s", "task_id": "t"})
        store.append({"split": "s", "task_id": "u"})
    path.write_bytes(path.read_bytes()[:-5])
    with opened(path) as store:
        assert len(store) == 1
        store.append({"split": "s", "task_id": "u"})
    assert [json.loads(line)["record"]["task_id"] for line in path.read_text().splitlines()] == ["t", "u"]


def test_fingerprints_are_kept_apart(tmp_path):
    path = tmp_path / "store.jsonl"
    for fingerprint in ("f", "g"):
        with opened(path, fingerprint) as store:
            assert len(store) == 0
            store.append({"split": "s", "task_id": "t", "by": fingerprint})
    with opened(path, "f") as store:
        assert store["s", "t"]["by"] == "f"
    assert [record["by"] for record in read_records(path, "g")] == ["g"]


def test_refusals(tmp_path):
    path = tmp_path / "store.jsonl"
    with opened(path) as store:
        store.append({"split": "s", "task_id": "t"})
        with pytest.raises(ValueError, match="already"):
            store.append({"split": "s", "task_id": "t"})
        with pytest.raises(ValueError, match="JSON"):
            store.append({"split": "s", "task_id": "u", "value": math.nan})
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is damaged"):
        opened(path)


def test_readers_do_not_write(tmp_path):
    path = tmp_path / "store.jsonl"
    with ResultStore(path, fingerprint="f", write=False) as store:
        store.append({"split": "s", "task_id": "t"})
        assert ("s", "t") in store
    assert not path.exists()
