"""A run's configuration as commands read it: a config file, its argument, and overrides of single fields."""

import importlib.util
import inspect
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from cft_jax.common.errors import UserError
from cft_jax.config.records import read_override
from cft_jax.config.run import Config, from_config_dict, validate

# The configs of this package: in a wheel, and in a checkout.
_SHIPPED = tuple(root / "configs" for root in (Path(__file__).parents[1], Path(__file__).parents[2]))
# What a config file's own code may raise where it is wrong.
_IN_CODE = (
    *(SyntaxError, ImportError, NameError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(RuntimeError, OSError, TypeError, ValueError),
)


def config_of(
    values: flags.FlagValues, *, example: str = "configs/demo.py, which needs no network and no accelerator"
) -> Config:
    """The checked configuration of a command line's flags `config` and `override`; `example` fits the command.

    Raises:
      UserError: no `--config` was given, or see `load_config` and `validate`.
    """
    if not values["config"].value:
        raise UserError(f"--config is missing; try --config={example}")
    config = load_config(values["config"].value, values["override"].value or ())
    validate(config)
    return config


def config_name(values: flags.FlagValues) -> str:
    """Name of the config file with its argument, fit for a directory: `configs/llama.py:3b` is `llama-3b`."""
    file, _, argument = str(values["config"].value).partition(":")
    return Path(file).stem + (f"-{re.sub('[^A-Za-z0-9._-]+', '-', argument)}" if argument else "")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """What `get_config` of a file returns, with overrides; its values are not checked yet.

    Args:
      name: `FILE.py`, or the name of a shipped config (`demo`, `eval/structured`); `NAME:argument` where its
        `get_config` takes one.
      overrides: such as `train.batch_size=64`; of two of one field the last counts.

    Raises:
      UserError: the file is absent or wrong, or an override names no field or has a value of another type.
    """
    given, _, argument = name.partition(":")
    path = str(_file_of(given, name))
    arguments = (argument,) if ":" in name else ()
    try:
        get_config = _module(path).get_config
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            takes = "takes no" if arguments else "needs an"
            raise UserError(f"this config file {takes} argument after a colon") from None
        config = get_config(*arguments)
    except UserError as error:
        raise UserError(f"--config={name}: {error}") from error
    except _IN_CODE as error:
        raise UserError(f"--config={name}: {_what_and_where(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config returns a {type(config).__name__}; it must return a ConfigDict")
    for assignment in overrides:
        # On the file's own dict, where a value may be shared by reference.
        (*parents, field), value = read_override(Config(), assignment)
        record: Any = config
        for parent in parents:
            record = record[parent]
        with record.unlocked(), record.ignore_type():
            record[field] = value
    return from_config_dict(config)


def nested_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides such as `train.batch_size=64` say, nested as `changed` takes it.

    Raises:
      UserError: one names no field or has a value of another type.
    """
    nested: dict[str, Any] = {}
    for assignment in overrides:
        (*parents, field), value = read_override(Config(), assignment)
        record: Any = nested
        for parent in parents:
            record = record.setdefault(parent, {})
        record[field] = value
    return nested


def _file_of(given: str, name: str) -> Path:
    """The config file that is named: a file, or one that is shipped, by its name or by its place in a checkout."""
    file = Path(given)
    if file.is_file() and file.suffix == ".py":
        return file
    roots = [root for root in _SHIPPED if root.is_dir()]
    shipped = given.removeprefix("configs/").removesuffix(".py")
    if shipped and (given.startswith("configs/") or given == shipped):
        for root in roots:
            if (root / f"{shipped}.py").is_file():
                return root / f"{shipped}.py"
    # Those beside it are what was meant, as a rule.
    known = sorted(str(path) for path in file.parent.glob("*.py")) if file.suffix == ".py" else []
    known = known or sorted(str(path.relative_to(root))[:-3] for root in roots for path in root.rglob("*.py"))
    what = "is no config, a Python file" if file.is_file() else "there is no such file"
    raise UserError(f"--config={name}: {what}; there are {', '.join(known[:15])}")


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _what_and_where(error: Exception, path: str) -> str:
    """A mistake in the code of a config file; a ValueError is one that the file itself found, in its argument."""
    if type(error) is ValueError:
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == Path(path).absolute()] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}: {type(error).__name__}: {error}"
