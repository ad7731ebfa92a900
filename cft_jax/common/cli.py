"""The manners shared by every command: flags, configs, one-line errors, exit codes.

A user's mistake (`UserError`, an unknown flag or config field, a wrong type) prints one line and exits with 2, or with
75 where the same command may go better another time; so does what the machine lacks: space on a disk, permission to
write, memory. Every other exception is our own mistake: it keeps its stack trace and exits with 1. 130 and 143 stand
for Ctrl-C and SIGTERM.
"""

import errno
import logging as stdlib_logging
import os
import re
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags, logging

from cft_jax.common.errors import UserError
from cft_jax.common.memory import keep_freed_memory

# What a machine refuses, and the fix.
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
# The flag that `--config.a.b=value` is to absl.
_OVERRIDE = "override"
Main = Callable[[flags.FlagValues], None]


def new_flags(*, config: bool, overrides: bool = False) -> flags.FlagValues:
    """Flag values of one command, apart from absl's global ones: help, verbosity and, where wanted, `--config`.

    With `overrides` alone, single fields can be set (`--config.a.b=value`), and no file is read.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    flags.DEFINE_bool("quiet", False, "Print warnings and the final summary only.", flag_values=values)
    flags.DEFINE_bool("verbose", False, "Print debugging messages too.", flag_values=values)
    if config:
        file = "Config file, with an argument after a colon where it takes one (configs/llama.py:3b); "
        file += "override fields by --config.a.b=value."
        flags.DEFINE_string("config", None, file, flag_values=values)
    if config or overrides:
        flags.DEFINE_multi_string(_OVERRIDE, [], "", flag_values=values)
    return values


def run(main: Main, values: flags.FlagValues, description: str) -> None:
    """Parses the command line into `values`, sets up logging, calls `main` with them, exits with the code that fits.

    `values` come from `new_flags`, with the command's own flags defined on them; `description` is for `--help`.
    """
    keep_freed_memory()
    try:
        if any(arg in ("--help", "-h", "--helpfull", "-help") for arg in sys.argv[1:]):
            sys.stdout.write(_help(values, description))
            sys.exit(0)
        _parse(values, sys.argv)
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
        sys.stderr.write("interrupted; the same command resumes where this run stopped\n")
        sys.exit(130)


def _end(message: str, code: int = UserError.exit_code) -> NoReturn:
    sys.stderr.write(f"{_red('error:')} {' '.join(message.split())}\n")
    sys.exit(code)


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    try:
        rest = values(list(_with_overrides(argv)) if _OVERRIDE in values else argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    if len(rest) > 1 and "args" not in values:
        is_config = "config" in values and Path(rest[1].partition(":")[0]).is_file()
        hint = f"did you mean --config={rest[1]}?" if is_config else "see --help"
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value; {hint}")
    if len(rest) > 1:
        values["args"].value = rest[1:]
    if values["quiet"].value and values["verbose"].value:
        raise UserError("--quiet and --verbose exclude each other; give one of them")


def _with_overrides(argv: Sequence[str]) -> Iterator[str]:
    """The words of a command line with `--override=a.b=value` for `--config.a.b=value`, whose fields absl cannot know.

    A value may be a word of its own; `--config.a.b` and `--noconfig.a.b` alone stand for True and False.
    """
    words = deque(argv)
    while words:
        word = words.popleft()
        found = re.fullmatch(r"--?(no)?config\.([^=]*)(=.*)?", word, re.DOTALL)
        if found is None:
            yield word
            continue
        negated, field, value = found.groups()
        if value is None:
            is_next = not negated and words and not words[0].startswith("--")
            value = f"={words.popleft() if is_next else not negated}"
        yield f"--{_OVERRIDE}={field}{value}"


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
    # Nothing of orbax: it shares absl's logger, reports every file that it writes, warns of what it was told, and logs
    # the errors that it raises.
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
    for name in sorted(name for name in values if len(name) > 1 and name != _OVERRIDE):
        flag = values[name]
        default = "" if flag.default in (None, False, "", []) else f" (default: {flag.default})"
        # Words that follow the flags are a flag to absl alone.
        text = f"{flag.help}{default}" if name == "args" else f"--{name}: {flag.help}{default}"
        lines.append(textwrap.fill(text, _HELP_WIDTH, initial_indent="  ", subsequent_indent=" " * 6))
    if _OVERRIDE in values:
        lines += ["", "--config.a.b=value sets a field of the configuration; docs/config.md explains them all."]
    return "\n".join([*lines, "", _EXIT_CODES]) + "\n"
