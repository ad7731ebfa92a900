"""A store that is a directory, reached by epath under gs:// names."""

from pathlib import Path

import pytest
from etils.epath import backend, gpath

from cft_jax.common.storage import google_answers


class Bucket(backend._OsPathBackend):
    """epath's backend of local files, for addresses gs://NAME/... that lie under a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        root = super().__getattribute__("root")

        def call(path, *args, **kwargs):
            assert path.startswith("gs://"), path
            return found(str(root / path.removeprefix("gs://")), *args, **kwargs)

        return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The directory behind gs://."""
    root = tmp_path / "store"
    (root / "bucket").mkdir(parents=True)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "here")
    google_answers.cache_clear()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket(root))
    return root / "bucket"
