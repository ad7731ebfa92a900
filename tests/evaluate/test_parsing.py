"""Reading of questions and of open answers equals the reference's (tests/golden/parsing.jsonl.gz)."""

import dataclasses

from cft_jax.evaluate import parsing


def test_mcq(golden_rows):
    for row in golden_rows("parsing", "mcq"):
        expected = {**row["parsed"], "format_errors": tuple(row["parsed"]["format_errors"])}
        assert dataclasses.asdict(parsing.parse_mcq(row["raw"])) == expected, row["index"]


def test_open_answers(golden_rows):
    for row in golden_rows("parsing", "open_random"):
        assert parsing.normalize_answer(row["raw"]) == row["normalized"], row["raw"]
        assert parsing.has_thinking_tags(row["raw"]) is row["has_thinking_tags"]
