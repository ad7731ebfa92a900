"""Numbers read from text and checked against supports, as the paper does (tests/golden/parsing.jsonl.gz)."""

import dataclasses
import gzip
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cft_jax.distributions.parse import number_error, parse_number, parse_numbers, strip_thinking
from cft_jax.distributions.splits import PromptSpec


@pytest.fixture(scope="module")
def rows(golden):
    with gzip.open(golden / "parsing.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def as_read(record):
    """A golden record with its value as a float, where it is "Infinity"."""
    value = record["value"]
    return {**record, "value": float(value) if isinstance(value, str) else value}


def make_spec(row):
    return PromptSpec(
        split="test",
        family_id=row["family_id"],
        distribution_id="any",
        parameters=row["parameters"],
        prompt="",
    )


def test_numbers(rows):
    numbers = [row for row in rows if row["kind"] == "number"]
    assert len(numbers) == 89
    for row in numbers:
        assert strip_thinking(row["raw"]) == row["stripped"]
        for name in ("raw", "stripped"):
            text, spec = row[name], make_spec(row)
            parsed = parse_number(text)
            assert dataclasses.asdict(parsed) == as_read(row[f"single_of_{name}"]), text
            batch = [dataclasses.asdict(part) for part in parse_numbers(text)]
            assert batch == [as_read(part) for part in row[f"batch_of_{name}"]], text
            want = row[f"validate_single_of_{name}"]
            if parsed.value is None:
                assert want == {"ok": None, "error_code": None}
            else:
                code = number_error(parsed.value, spec)
                assert (code is None, code) == (want["ok"], want["error_code"]), text


def test_validation(rows):
    checked = [row for row in rows if row["kind"] == "validate"]
    assert len(checked) == 84
    for row in checked:
        code = number_error(float(row["value"]), make_spec(row))
        assert (code is None, code) == (row["ok"], row["error_code"]), row


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_reads_back_what_python_writes(value):
    parsed = parse_number(f" {value!r}\n")
    assert parsed.valid and parsed.value == value
    assert math.copysign(1, parsed.value) == math.copysign(1, value)
