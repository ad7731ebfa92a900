"""The manners shared by every command: flags, configs, one-line errors, exit codes.

A user's mistake (`UserError`, an unknown flag or config field, a wrong type) prints one line and exits with 2, or with
75 where the same command may go better another time; so does what the machine lacks: space on a disk, permission to
write, memory. Every other exception is our own mistake: it keeps its stack trace and exits with 1. 130 and 143 stand
for Ctrl-C and SIGTERM.
"""

import errno
import itertools
import logging as stdlib_logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from cft_jax.common.errors import UserError
from cft_jax.common.memory import keep_freed_memory

# What a field takes, by what absl and ml_collections say when they are given something else.
_TAKEN = {
    "invalid literal for int()": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "True or False",
    "is not a dict": "set field by field, as --config.model.dtype=float32",
}
# What a config file's own code raises where it is wrong, beside what flags raise.
_IN_CODE = (SyntaxError, ImportError, NameError, LookupError, ArithmeticError, AssertionError, RuntimeError, OSError)
# What a machine refuses, and its cure.
_REFUSED = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit of the file system, or of ulimit -f",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "name a place that you may read and write",
    errno.EPERM: "name a place that you may read and write",
}
_HELP_WIDTH = 100
_EXIT_CODES = """Exit codes: 0 done, 2 a mistake in the command or a machine that lacks space, permission or memory,
75 other machines did not come (try again), 130 Ctrl-C, 143 saved after SIGTERM, 1 a fault of the program's own."""
Main = Callable[[flags.FlagValues], None]


def new_flags(*, config: bool) -> flags.FlagValues:
    """Flag values of one command, apart from absl's global ones: help, verbosity and, where wanted, `--config`."""
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    flags.DEFINE_bool("quiet", False, "Print warnings and the final summary only.", flag_values=values)
    flags.DEFINE_bool("verbose", False, "Print debugging messages too.", flag_values=values)
    if config:
        config_flags.DEFINE_config_file(
            "config",
            None,
            "Config file, with an argument after a colon where it takes one (configs/llama.py:3b); "
            "override fields by --config.a.b=value.",
            lock_config=True,
            flag_values=values,
        )
    return values


def run(main: Main, values: flags.FlagValues, description: str) -> None:
    """Parses the command line into `values`, sets up logging, calls `main`, and exits with the code that fits.

    Args:
      main: the command's work; receives the parsed flags.
      values: made by `new_flags`, with the command's own flags defined on it.
      description: what the command does, for `--help`.
    """
    keep_freed_memory()
    argv = sys.argv  # where ml_collections looks for overrides, whatever it is handed
    try:
        if any(arg in ("--help", "-h", "--helpfull", "-help") for arg in argv[1:]):
            sys.stdout.write(_help(values, description))
            sys.exit(0)
        _parse(values, argv)
        _set_up_logging(quiet=bool(values["quiet"].value), verbose=bool(values["verbose"].value))
        main(values)
    except UserError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _end(f"{error.strerror}{where}: {_REFUSED[error.errno]} and repeat the command; what is whole stays")
    except (MemoryError, RuntimeError) as error:
        # JAX's own exception is a RuntimeError; training has a message of its own.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _end(
            "out of memory: cut the weights over all devices with config.mesh.data=1 and config.mesh.fsdp=-1, where "
            "there are several; cft_jax.export needs none of them: JAX_PLATFORMS=cpu "
            f"({' '.join(str(error).split())[:200]})"
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where this run stopped\n")
        sys.exit(130)


def _end(message: str, code: int = UserError.exit_code) -> NoReturn:
    sys.stderr.write(f"{_red('error:')} {' '.join(message.split())}\n")
    sys.exit(code)


def config_of(
    values: flags.FlagValues, *, example: str = "configs/demo.py, which needs no network and no accelerator"
) -> ConfigDict:
    """The ConfigDict of `--config`, with its overrides.

    Args:
      values: the parsed flags.
      example: a config that fits the command, named where there is none.

    Raises:
      UserError: no `--config` was given.
    """
    config = values["config"].value
    if config is None:
        raise UserError(f"--config is missing; try --config={example}")
    return config


def config_name(values: flags.FlagValues) -> str:
    """Name of the config file with its argument, fit for a directory: `configs/llama.py:3b` is `llama-3b`."""
    file, _, argument = config_flags.get_config_filename(values["config"]).partition(":")
    return Path(file).stem + (f"-{re.sub('[^A-Za-z0-9._-]+', '-', argument)}" if argument else "")


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    for name in _config_files(argv):
        _check_config_file(name)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_mended(error, argv)) from error
    except _IN_CODE as error:
        raise UserError(_in_code(error, next(_config_files(argv), ""))) from error
    if len(rest) > 1 and "args" not in values:
        hint = f"did you mean --config={rest[1]}?" if "config" in values and _is_file(rest[1]) else "see --help"
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value; {hint}")
    if len(rest) > 1:
        values["args"].value = rest[1:]
    if values["quiet"].value and values["verbose"].value:
        raise UserError("--quiet and --verbose exclude each other; give one of them")


def _config_files(argv: Sequence[str]) -> Iterator[str]:
    """What --config names, with its argument, however it is written."""
    for word, following in itertools.pairwise([*argv[1:], ""]):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            yield value if equals else following


def _is_file(name: str) -> bool:
    return Path(name.partition(":")[0]).is_file()


def _check_config_file(name: str) -> None:
    file = Path(name.partition(":")[0])
    if file.is_file() and file.suffix == ".py":
        return
    # Those beside it are what was meant, as a rule.
    known = sorted(str(path) for path in file.parent.glob("*.py")) or ["configs/demo.py"]
    what = "is no config, a Python file" if file.is_file() else "there is no such file"
    raise UserError(f"--config={name}: {what}; there are {', '.join(known[:12])}")


def _mended(error: Exception, argv: Sequence[str]) -> str:
    """The message of an absl or ml_collections error, without their Python-level wording."""
    text = str(error.args[0] if error.args else error).replace("FATAL Flags parsing error: ", "")
    if "whilst parsing config file" in text:
        return _in_config_file(text)
    near = re.search(r'Did you mean "([^"]+)" instead of "([^"]+)"', text)
    if isinstance(error, AttributeError | KeyError):
        name = near.group(2) if near else text.strip("'\" ").split()[0]
        hint = f"did you mean {near.group(1)!r}?" if near else "cft_jax/config.py lists the fields"
        return f"unknown config field {_path(name, argv)!r}; {hint}"
    wrong = re.match(r"flag --(config\.[\w.]+)=(.*?): (.*)", text, flags=re.DOTALL)
    for words, taken in _TAKEN.items() if wrong else ():
        if wrong and words in wrong.group(3):
            return f"{wrong.group(1)}={wrong.group(2)!r} must be {taken}"
    return text


def _in_config_file(text: str) -> str:
    """A mistake that a config file found, in its argument as a rule; it arrives with the stack trace of its making."""
    flag = text.partition("flag ")[2].partition(": ")[0]
    kind, _, message = text.rstrip().splitlines()[-1].partition(": ")
    if kind == "TypeError" and "positional argument" in message:
        return f"{flag}: this config file takes no argument after a colon"
    places = re.findall(r'File "([^"]+)", line (\d+)', text)
    if kind in ("ValueError", UserError.__name__) or kind.endswith(f".{UserError.__name__}") or not places:
        return f"{flag}: {message}"
    return f"{flag}: {places[-1][0]}, line {places[-1][1]}: {kind}: {message}"


def _in_code(error: Exception, name: str) -> str:
    """What is wrong with the code of a config file, and where."""
    file, line = name, None
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    elif frames := traceback.extract_tb(error.__traceback__):
        file, line = frames[-1].filename, frames[-1].lineno
    said = error.msg if isinstance(error, SyntaxError) else error
    return f"--config={name}: {file}, line {line}: {type(error).__name__}: {said}"


def _path(name: str, argv: Sequence[str]) -> str:
    """The field's whole path, as the command line has it."""
    for arg in argv:
        found = re.match(rf"--(config\.(?:[\w.]+\.)?{re.escape(name)})\b", arg)
        if found:
            return found.group(1)
    return name


def _set_up_logging(*, quiet: bool, verbose: bool) -> None:
    # absl's logging waits for absl's global flags, which these commands leave alone.
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logging.set_stderrthreshold("debug" if verbose else "warning" if quiet else "info")
    handler = logging.get_absl_handler()
    handler.setFormatter(None if verbose else _Plain())
    handler.filters = [] if verbose else [_worth_reading]
    # XLA's and transformers' own chatter is of no use to a reader of the run's log.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if verbose else "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _worth_reading(record) -> bool:
    """What this package says, and other libraries' warnings.

    Nothing of orbax: it shares absl's logger, reports every file that it writes, warns of what it was told, and logs
    the errors that it raises.
    """
    if "orbax" in Path(record.pathname).parts:
        return False
    return record.name == "absl" or record.levelno >= stdlib_logging.WARNING


class _Plain(logging.PythonFormatter):
    """The message alone; warnings and errors say that they are."""

    def format(self, record):
        text = record.getMessage()
        return text if record.levelno < stdlib_logging.WARNING else f"{record.levelname.lower()}: {text}"


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


def _help(values: flags.FlagValues, description: str) -> str:
    lines = [description.strip(), "", "Flags:"]
    for name in sorted(name for name in values if len(name) > 1):
        flag = values[name]
        default = "" if flag.default in (None, False, "", []) else f" (default: {flag.default})"
        # Words that follow the flags are a flag to absl alone.
        text = f"{flag.help}{default}" if name == "args" else f"--{name}: {flag.help}{default}"
        lines.append(textwrap.fill(text, _HELP_WIDTH, initial_indent="  ", subsequent_indent=" " * 6))
    if "config" in values:
        lines += ["", "docs/config.md explains every field of the configuration."]
    return "\n".join([*lines, "", _EXIT_CODES]) + "\n"
