"""The shape of the code, read from its syntax: who imports whom, how long files are, which settings are used."""

import ast
import dataclasses
from pathlib import Path

from cft_jax.config import Config

PACKAGE = Path(__file__).parents[1] / "cft_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Every package and every module beside them, from the bottom up: a file imports from its own and from those before it.
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
    "generate",
    "train",
    "runs",
    "plan",
    "evaluate.parsing",
    "evaluate.metrics",
    "evaluate.store",
    "evaluate.results",
    "evaluate.backends",
    "evaluate.ssot",
    "evaluate.prompting",
    "evaluate.suites",
    "evaluate.report",
    "ask",
    "serving",
    "jobs",
    "api",
)
# The commands: they import what they need, and nothing imports them.
COMMANDS = (
    "__main__",
    "main",
    "sample",
    "prepare",
    "export",
    "compare",
    "check",
    "frontier",
    "evaluate.__main__",
    "plan.__main__",
    "evaluate.suites.retention.convert_items",
)
# Beyond the order: the mathematics does not know where its numbers come from, and data is numpy alone.
DATA_SIDE = {"distributions", "text", "data"}
FORBIDDEN = {name: DATA_SIDE for name in ("sharding", "models", "checkpoints", "objectives")}
WITHOUT_JAX = ("config", "distributions", "text", "data")
MAX_LINES = 600
MAX_FLAT_FILES = 12


def module(path: Path) -> str:
    """Dotted name of a file below the package; a package's own is that of its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def layer(name: str) -> str:
    """The entry of ORDER that a module belongs to; itself where none does."""
    return next((entry for entry in ORDER if name == entry or name.startswith(f"{entry}.")), name)


def imports(path: Path) -> list[str]:
    """Dotted names of what a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_file_has_its_place():
    # The two packages that hold others have no code of their own but what makes them Python's face.
    names = {module(path) for path in FILES} - {"", "evaluate"}
    assert {name for name in names if layer(name) not in ORDER and name not in COMMANDS} == set()
    assert len(list((PACKAGE / "evaluate").glob("*.py"))) <= MAX_FLAT_FILES


def test_imports_go_one_way():
    wrong = []
    for path in FILES:
        here = module(path)
        for name in imports(path):
            if here not in COMMANDS and layer(here) in WITHOUT_JAX and name.split(".")[0] in ("jax", "flax"):
                wrong.append(f"{here} imports {name}")
            if not name.startswith("cft_jax."):
                continue
            there = name.removeprefix("cft_jax.")
            if any(there == command or there.startswith(f"{command}.") for command in COMMANDS):
                wrong.append(f"{here} imports the command {there}")
            elif here in ORDER or (layer(here) in ORDER and here not in COMMANDS):
                above = ORDER.index(layer(there)) > ORDER.index(layer(here))
                if above or layer(there) in FORBIDDEN.get(layer(here), ()):
                    wrong.append(f"{here} imports {there}")
    assert not wrong


def test_files_stay_short():
    assert [path.name for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES] == []


def test_every_config_field_is_read():
    read = set()
    for path in FILES:
        if path.parent != PACKAGE / "config":
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
