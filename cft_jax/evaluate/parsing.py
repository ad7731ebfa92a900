"""Reads what models write: multiple-choice questions and short open answers, by the paper's rules.

Numbers are read by `cft_jax.distributions.parse_number`.
"""

import re
from dataclasses import dataclass

from cft_jax.distributions import strip_thinking

ANSWER_LABELS = ("A", "B", "C", "D")

_STRAY_TAG = re.compile(r"</?think>", re.IGNORECASE)
_OPTIONS = ("option_a", "option_b", "option_c", "option_d")
_PREFIXES = {"Question:": "question", "Correct Answer:": "correct_answer", "Explanation:": "explanation"} | {
    f"{label}.": name for label, name in zip(ANSWER_LABELS, _OPTIONS, strict=True)
}
# The order in which the paper's record lists what is missing, then what is empty.
_MISSING_ORDER = (*_OPTIONS, "question", "explanation", "correct_answer")
_EMPTY_ORDER = ("question", "explanation", *_OPTIONS)


@dataclass(frozen=True)
class Mcq:
    """A multiple-choice question as read from one generation; absent parts are empty strings."""

    question_text: str = ""
    option_a: str = ""
    option_b: str = ""
    option_c: str = ""
    option_d: str = ""
    correct_answer: str = ""
    explanation: str = ""
    is_parseable: bool = False
    format_errors: tuple[str, ...] = ()
    unique_options: bool = False
    correct_option_nonempty: bool = False
    option_prefixes_valid: bool = False
    has_valid_correct_answer: bool = False


def parse_mcq(text: str) -> Mcq:
    """Reads a question with options A to D, a declared answer and an explanation.

    Thinking traces and stray tags are removed and blank lines dropped; every other line must begin with exactly one of
    the known prefixes, each of which counts once. Runs of whitespace inside a part become one space. `format_errors`
    names all that is wrong, in the paper's order, and `is_parseable` means there is nothing. A declared answer is valid
    if it is exactly A, B, C or D.
    """
    lines = [line.strip() for line in _without_thinking(text).splitlines() if line.strip()]
    if not lines:
        return Mcq(format_errors=("empty_response",))
    parts, errors = _read_lines(lines)
    errors += [f"missing_{name}" for name in _MISSING_ORDER if name not in parts]
    prefix_errors = {f"{kind}_{name}" for kind in ("duplicate", "missing") for name in _OPTIONS}
    option_prefixes_valid = prefix_errors.isdisjoint(errors)
    texts = {name: parts.get(name, "") for name in _PREFIXES.values()}
    errors += [f"empty_{name}" for name in _EMPTY_ORDER if not texts[name]]
    answer = texts["correct_answer"]
    if answer not in ANSWER_LABELS:
        errors.append("invalid_correct_answer")
    options = {label: texts[name] for label, name in zip(ANSWER_LABELS, _OPTIONS, strict=True)}
    return Mcq(
        question_text=texts.pop("question"),
        **texts,
        is_parseable=not errors,
        format_errors=tuple(errors),
        unique_options=all(options.values()) and len(set(options.values())) == len(options),
        correct_option_nonempty=bool(options.get(answer)),
        option_prefixes_valid=option_prefixes_valid,
        has_valid_correct_answer=answer in ANSWER_LABELS,
    )


def normalize_answer(text: str) -> str:
    """The first non-empty line of a short open answer, without thinking trace, extra spaces and one pair of quotes.

    Runs of any whitespace become one space; a pair of quotes is two equal signs (' or ") around the whole line.
    """
    lines = (" ".join(line.split()) for line in _without_thinking(text).splitlines())
    first = next((line for line in lines if line), "")
    if len(first) >= 2 and first[0] == first[-1] and first[0] in "'\"":
        return first[1:-1].strip()
    return first


def has_thinking_tags(text: str) -> bool:
    """Whether a generation has any tag of a thinking trace, opened or closed."""
    return _STRAY_TAG.search(text) is not None


def _without_thinking(text: str) -> str:
    return _STRAY_TAG.sub("", strip_thinking(text))


def _read_lines(lines: list[str]) -> tuple[dict[str, str], list[str]]:
    """The first occurrence of every part, and what was repeated or unknown, in order."""
    parts: dict[str, str] = {}
    errors: list[str] = []
    for line in lines:
        prefix = next((prefix for prefix in _PREFIXES if line.startswith(prefix)), None)
        if prefix is None:
            errors.append("unexpected_line")
        elif _PREFIXES[prefix] in parts:
            errors.append(f"duplicate_{_PREFIXES[prefix]}")
        else:
            parts[_PREFIXES[prefix]] = " ".join(line.removeprefix(prefix).split())
    return parts, errors
