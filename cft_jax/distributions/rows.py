"""Files of the user's with one JSON object per line: read whole or refused, with the number of every bad line."""

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cft_jax.common.errors import UserError

Row = Mapping[str, Any]
Messages = tuple[Mapping[str, str], ...]

_T = TypeVar("_T")
_PROBLEMS_SHOWN = 10


def read_rows(path: str | Path, field: str, read: Callable[[Row, int], _T]) -> list[_T]:
    """What `read` makes of every row of a file, UTF-8, and of the number of its line; `field` named the file.

    Raises:
      UserError: the file cannot be read or is empty, or `read` refuses rows: one message with every bad line's number
        (the first ten with their reasons). No row is skipped.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:  # the latter of a NUL in the path
        raise UserError(f"cannot read {field}={str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    # Not splitlines(): it would also break lines at separators that JSON strings may hold.
    lines = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise UserError(f"{field}={str(path)!r} is empty; give it one JSON object per line")
    found, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(read(_parse(line), number))
        except UserError as error:
            problems.append((number, error))
    if problems:
        shown = " | ".join(f"line {number}: {problem}" for number, problem in problems[:_PROBLEMS_SHOWN])
        rest = ", ".join(str(number) for number, _ in problems[_PROBLEMS_SHOWN:])
        more = f" | and lines {rest}" if rest else ""
        raise UserError(f"{len(problems)} of {len(lines)} lines of {field}={str(path)!r} are wrong: {shown}{more}")
    return found


def _parse(line: bytes) -> Row:
    if not line.strip():
        raise UserError("is empty; delete it")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested lists
        raise UserError(f"is not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"must be a JSON object, not {reprlib.repr(row)}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ; Python's own reader keeps the last of equal keys in silence."""
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise UserError(f"{repeated[0]!r} occurs more than once in one object")
    return dict(pairs)


def one_of(names: Sequence[str]) -> str:
    """The names as words of a message."""
    return f"one of {', '.join(names)}"


def prompt_messages(row: Row) -> Messages:
    """The messages of a row with `prompt`, one user message, or with `messages`, of which the last is the user's.

    Raises:
      UserError: they are not what they must be.
    """
    if "prompt" in row:
        return ({"role": "user", "content": text_of(row["prompt"], "prompt")},)
    return conversation(row["messages"], last="user")


def conversation(messages: Any, *, last: str) -> Messages:
    """The messages of a conversation, of which the last is by this role.

    Raises:
      UserError: they are not what they must be.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of objects with role and content")
    read = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UserError(f"messages[{index}] must be an object with exactly role and content")
        read.append({"role": message["role"], "content": text_of(message["content"], f"messages[{index}].content")})
    turns = [message["role"] for message in read]
    turns = turns[1:] if turns[0] == "system" else turns
    if turns != (["user", "assistant"] * len(turns))[: len(turns)] or turns[-1:] != [last]:
        raise UserError(
            f"messages must be an optional system message, then user and assistant in turn, the {last} last"
        )
    return tuple(read)


def text_of(value: Any, name: str) -> str:
    """The value, a text that is not empty.

    Raises:
      UserError: it is none.
    """
    if not isinstance(value, str) or not value:
        raise UserError(f"{name}={reprlib.repr(value)} must be a text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half of a character (a lone surrogate), which has no UTF-8 form") from error
    return value
