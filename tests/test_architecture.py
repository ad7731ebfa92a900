"""The shape of the code, read from its syntax: who imports whom, how long files are, which settings are used."""

import ast
import dataclasses
from pathlib import Path

import pytest

from cft_jax.config import Config

PACKAGE = Path(__file__).parents[1] / "cft_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    "common",
    "config",
    "distributions",
    "text",
    "data",
    "sharding",
    "models",
    "checkpoints",
    "objectives",
    "train",
    "generate",
    "evaluate",
    "main",
)
# Beyond the order: the mathematics does not know where its numbers come from, and data is numpy alone.
DATA_SIDE = {"distributions", "text", "data"}
FORBIDDEN = {
    "sharding": DATA_SIDE,
    "models": DATA_SIDE,
    "checkpoints": DATA_SIDE,
    "objectives": DATA_SIDE,
    "evaluate": {"train"},
}
WITHOUT_JAX = ("distributions", "text", "data")
MAX_LINES = 600


def place(path: Path) -> str:
    """The package of a file; commands, at the top level or as a package's `__main__`, count as `main`."""
    if path.name == "__main__.py":
        return "main"
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if first == "suite_config":
        return "config"
    return first if first in ORDER else "main"


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "cft_jax"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = place(path)
    for name in imports(path):
        if name.startswith("cft_jax."):
            there = place(PACKAGE / Path(*name.split(".")[1:2]))
            assert ORDER.index(there) <= ORDER.index(here), f"{here} imports {name}"
            assert there not in FORBIDDEN.get(here, set()), f"{here} imports {name}"
        if here in WITHOUT_JAX:
            assert name.split(".")[0] not in ("jax", "flax"), f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_config_field_is_read():
    read = set()
    for path in FILES:
        if path.name not in ("config.py", "suite_config.py") or path.parent != PACKAGE:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)

    def fields(record) -> list[str]:
        found = []
        for field in dataclasses.fields(record):
            found.append(field.name)
            value = getattr(record, field.name)
            found += fields(value) if dataclasses.is_dataclass(value) else []
        return found

    assert not set(fields(Config())) - read, "config fields that nothing reads"
