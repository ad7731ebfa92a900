"""The cache on disk: what is stored is found again, and nothing damaged is ever trusted."""

import concurrent.futures
import errno
import os
import threading
import time

import numpy as np
import pytest

from cft_jax.common.errors import UserError
from cft_jax.data import cache

KEY = cache.key_of({"of": "these tests"})
WHOLE = {"a": np.arange(7, dtype=np.int32), "b": np.linspace(0, 1, 5), "c": np.empty(0, dtype=np.int64)}


def pieces():
    yield {"a": WHOLE["a"][:3], "b": WHOLE["b"][:0], "c": WHOLE["c"]}
    yield {"a": WHOLE["a"][3:], "b": WHOLE["b"]}


def check(arrays):
    assert arrays.keys() == WHOLE.keys()
    for name, array in WHOLE.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
        assert arrays[name].size == 0 or not arrays[name].flags.writeable


def test_stored_arrays_are_found(tmp_path):
    assert cache.load(tmp_path, KEY) is None
    check(cache.store(tmp_path / "deep" / "er", KEY, pieces()))
    check(cache.load(tmp_path / "deep" / "er", KEY))
    assert len(list((tmp_path / "deep" / "er").iterdir())) == 1


def test_keys_tell_contents_apart():
    assert cache.key_of({"x": 1, "y": [2]}) == cache.key_of({"y": [2], "x": 1})
    assert len({cache.key_of(content) for content in ({"x": 1}, {"x": 2}, {"x": "1"}, {"x": 1.5})}) == 4


def header_size(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[header_size(path) + 64 + 11] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[: header_size(path) + 20])


def cut_the_header(path):
    path.write_bytes(path.read_bytes()[: header_size(path) - 50])


def damage_the_header(path):
    content = bytearray(path.read_bytes())
    content[9:12] = b"\xff[}"
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def take_anothers_header(path):
    path.write_bytes(path.read_bytes().replace(KEY.encode(), KEY[::-1].encode()))


@pytest.mark.parametrize(
    "damage", [flip_a_bit, shorten, cut_the_header, damage_the_header, empty, take_anothers_header]
)
def test_damage_is_seen_said_and_mended(tmp_path, damage, caplog):
    cache.store(tmp_path, KEY, pieces())
    (entry,) = tmp_path.iterdir()
    damage(entry)
    assert cache.load(tmp_path, KEY) is None
    assert "is damaged" in caplog.text and str(entry) in caplog.text
    check(cache.store(tmp_path, KEY, pieces()))
    check(cache.load(tmp_path, KEY))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield {"a": np.arange(3)}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.store(tmp_path, KEY, failing())
    assert not list(tmp_path.iterdir())


def test_pieces_must_fit_together(tmp_path):
    with pytest.raises(ValueError, match="a piece of a"):
        cache.store(tmp_path, KEY, iter([{"a": np.arange(3)}, {"a": np.arange(3.0)}]))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*set config\.data\.cache_dir"):
        cache.store(tmp_path / "file" / "cache", KEY, pieces())


def test_leftovers_of_killed_builds_are_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".building-old", tmp_path / ".building-young"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    cache.store(tmp_path, KEY, pieces())
    assert not old.exists() and young.exists()


def test_arrays_stay_whole_when_their_entry_is_replaced(tmp_path):
    first = cache.store(tmp_path, KEY, pieces())
    cache.store(tmp_path, KEY, ({name: np.zeros_like(array)} for name, array in WHOLE.items()))
    check(first)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        cache.store(tmp_path, KEY, pieces())
    assert not list(tmp_path.iterdir())


def store_slowly(root, barrier):
    def waiting():
        barrier.wait()
        yield from pieces()
        barrier.wait()

    check(cache.store(root, KEY, waiting()))


@pytest.mark.parametrize("damaged", [False, True])
def test_two_builders_at_once_agree(tmp_path, damaged):
    if damaged:
        cache.store(tmp_path, KEY, pieces())
        (entry,) = tmp_path.iterdir()
        flip_a_bit(entry)
    barrier = threading.Barrier(2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for built in [pool.submit(store_slowly, tmp_path, barrier) for _ in range(2)]:
            built.result(timeout=60)
    check(cache.load(tmp_path, KEY))
    assert len(list(tmp_path.iterdir())) == 1
