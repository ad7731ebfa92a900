"""Reads the numbers that models write, by the paper's rules.

Known oddities, kept so that figures stay comparable: "1e999" is a valid number (infinite, so it fails validation),
digits of any script count, and a thinking trace cut out of the middle of a number joins its halves.
"""

import math
import re
from dataclasses import dataclass

from cft_jax.distributions.families import find_family
from cft_jax.distributions.splits import PromptSpec

_THINKING = re.compile(r"<think>.*?</think>", re.IGNORECASE | re.DOTALL)
_OPEN_THINKING = re.compile(r"<think>.*", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_INTEGER_TOLERANCE = 1e-9


@dataclass(frozen=True)
class ParsedNumber:
    """A text read as one number: `value` where `valid`, else an `error_code`, `empty` or `malformed`."""

    raw: str
    valid: bool
    value: float | None
    error_code: str | None


def strip_thinking(text: str) -> str:
    """Removes thinking traces, closed ones and one that never ends, and the whitespace around what remains."""
    return _OPEN_THINKING.sub("", _THINKING.sub("", text)).strip()


def parse_number(text: str) -> ParsedNumber:
    """Reads a text that is one decimal number and, besides whitespace around it, nothing else."""
    stripped = text.strip()
    if not stripped:
        return ParsedNumber(text, False, None, "empty")
    if _NUMBER.fullmatch(stripped) is None:
        return ParsedNumber(text, False, None, "malformed")
    return ParsedNumber(text, True, float(stripped), None)


def parse_numbers(text: str) -> list[ParsedNumber]:
    """Reads comma-separated numbers, each part by itself; there is always at least one part."""
    return [parse_number(part) for part in text.strip().split(",")]


def number_error(value: float, spec: PromptSpec) -> str | None:
    """Why a number cannot come from the distribution of `spec`, or None if it can.

    Returns:
      `non_finite`, `below_support`, `above_support` (the bounds themselves are in) or, for integer families,
      `non_integer` (further than 1e-9 from an integer): the first that applies.
    """
    family = find_family(spec.family_id)
    lower, upper = family.support(spec.parameters)
    if not math.isfinite(value):
        return "non_finite"
    if value < lower:
        return "below_support"
    if value > upper:
        return "above_support"
    if family.integer_only and abs(value - round(value)) > _INTEGER_TOLERANCE:
        return "non_integer"
    return None
