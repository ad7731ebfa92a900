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
      name: `FILE.py`, or `FILE.py:argument` where its `get_config` takes one.
      overrides: such as `train.batch_size=64`; of two of one field the last counts.

    Raises:
      UserError: the file is absent or wrong, or an override names no field or has a value of another type.
    """
    path, _, argument = name.partition(":")
    _check_file(Path(path), name)
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
        (*parents, field), value = read_override(Config(), assignment)
        record: Any = config
        for parent in parents:
            record = record[parent]
        with record.unlocked(), record.ignore_type():
            record[field] = value
    return from_config_dict(config)


def _check_file(file: Path, name: str) -> None:
    if file.is_file() and file.suffix == ".py":
        return
    # Those beside it are what was meant, as a rule.
    known = sorted(str(path) for path in file.parent.glob("*.py")) or ["configs/demo.py"]
    what = "is no config, a Python file" if file.is_file() else "there is no such file"
    raise UserError(f"--config={name}: {what}; there are {', '.join(known[:12])}")


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
