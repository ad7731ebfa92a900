"""Records of settings: a rule beside each field, checked in one walk; values from mappings and from command lines.

A field's default says its type. A rule stands in the field's metadata: what a value must fulfil, and how to say that.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from absl import flags

from cft_jax.common.errors import UserError

_T = TypeVar("_T")
# How a type is read from a command line, and what to call its values.
_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (flags.BooleanParser().parse, "True or False"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
}


def ruled(default: Any, holds: Callable[[Any], bool], words: str) -> Any:
    """A field with a default and a rule; `words` end the sentence "config.x=3 must be ..."."""
    return dataclasses.field(default=default, metadata={"rule": (holds, words)})


def one_of(*allowed: str) -> Any:
    """A field that takes one of these; the first is the default."""
    return ruled(allowed[0], lambda value: value in allowed, f"one of {', '.join(allowed)}")


def some_of(*allowed: str) -> Any:
    """A tuple of one or more of these, by default all."""
    return ruled(allowed, lambda value: value and {*value} <= {*allowed}, f"some of {', '.join(allowed)}")


def at_least(low: int, default: int | float) -> Any:
    """A number that is `low` or more."""
    return ruled(default, lambda value: value >= low, f"at least {low}")


# Fields of one number each, made from their defaults.
positive = functools.partial(ruled, holds=lambda value: value > 0, words="greater than 0")
fraction = functools.partial(ruled, holds=lambda value: 0 <= value < 1, words="in [0, 1)")
share = functools.partial(ruled, holds=lambda value: 0 < value <= 1, words="in (0, 1]")


def broken_rules(record: Any, path: str = "config") -> Iterator[str]:
    """A sentence for every field of a record, or of the records in it, whose value breaks its rule."""
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from broken_rules(value, name)
        elif "rule" in field.metadata:
            holds, words = field.metadata["rule"]
            if not holds(value):
                yield f"{name}={value!r} must be {words}"


def record_of(cls: type[_T], values: Mapping[str, Any], path: str = "config") -> _T:
    """A record of this class, defaults where `values` have nothing.

    Raises:
      UserError: a field is unknown (the message names the nearest known one) or of a wrong type.
    """
    default = cls()
    return cls(**{name: _typed(_field(default, name, path), value, f"{path}.{name}") for name, value in values.items()})


def read_override(defaults: Any, assignment: str) -> tuple[list[str], Any]:
    """The path and the value of an override such as `train.tau=2.0`; a tuple's items have commas between.

    Raises:
      UserError: the field is unknown, or the text is none of its type.
    """
    path, _, text = assignment.partition("=")
    *parents, name = path.split(".")
    at, record = "config", defaults
    for parent in parents:
        record, at = _field(record, parent, at), f"{at}.{parent}"
        if not dataclasses.is_dataclass(record):
            raise UserError(f"unknown field config.{path}; {at} has no fields")
    default = _field(record, name, at)
    return [*parents, name], _read(default, text, f"config.{path}")


def _field(record: Any, name: str, path: str) -> Any:
    known = [field.name for field in dataclasses.fields(record)]
    if name in known:
        return getattr(record, name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {path}.{near[0]}?" if near else f"known fields: {', '.join(known)}"
    raise UserError(f"unknown field {path}.{name}; {hint}")


def _item_type(default: tuple) -> type:
    return type(default[0]) if default else str


def _read(default: Any, text: str, path: str) -> Any:
    """The value that `text` stands for in a field with this default."""
    if dataclasses.is_dataclass(default):
        example = f"--{path}.{dataclasses.fields(default)[0].name}="
        raise UserError(f"{path}={text!r} must be set field by field, as in {example}...")
    is_tuple = isinstance(default, tuple)
    reader, words = _READERS[_item_type(default) if is_tuple else type(default)]
    try:
        if is_tuple:
            items = (item.strip(" '\"") for item in text.strip(" ()[]").split(","))
            return tuple(reader(item) for item in items if item)
        return reader(text)
    except ValueError:
        many = f"{_item_type(default).__name__} values with commas between" if is_tuple else words
        raise UserError(f"{path}={text!r} must be {many}") from None


def _typed(default: Any, value: Any, path: str) -> Any:
    """`value` in the type of `default`; the one conversion allowed is from int to float and from list to tuple."""
    if dataclasses.is_dataclass(default):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r} must be a record with fields")
        return record_of(type(default), value, path)
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={value!r} must be a tuple such as {default!r}")
        kind = _item_type(default)
        if not all(type(item) is kind for item in value):
            raise UserError(f"{path}={value!r} must hold only {kind.__name__} values")
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{path}={value!r} is of type {type(value).__name__}; it takes {type(default).__name__}")
    return value
