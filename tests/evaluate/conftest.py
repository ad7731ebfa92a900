"""Rows of the golden files of the evaluation; tests/golden/README.md says what every field is."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@pytest.fixture(scope="session")
def golden_rows(golden: Path) -> Callable[..., list[dict[str, Any]]]:
    """Rows of `<name>.jsonl.gz`, of one kind if given, with non-finite numbers read back from their strings."""

    def read(name: str, kind: str | None = None) -> list[dict[str, Any]]:
        with gzip.open(golden / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        return [_numbers(row) for row in found if kind is None or row["kind"] == kind]

    return read


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
