"""A run's directory: what it was started with, and whether it may be resumed."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from flax.traverse_util import flatten_dict

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_json
from cft_jax.common.storage import Workdir
from cft_jax.config import RECORD, read_config
from cft_jax.runs.base import BASE

# What may differ when a run is resumed, as paths in the config; everything else shapes the weights.
MAY_CHANGE = ("train.max_steps", "mesh", "log", "checkpoint", "eval", "suite", "tasks", "export")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy", "scipy")


def check_workdir(workdir: Workdir, config: Any) -> bool:
    """Whether the run's directory is still to be made; changes nothing. `config` is a dataclass, resolved.

    Raises:
      UserError: the directory belongs to a run of another configuration (the fields are named), or holds other files.
    """
    directory = workdir.path
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a new or empty directory")
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    # Looked for last: another process of the same run may have put it there meanwhile, and whatever follows it.
    if (directory / RECORD).exists():
        _check_same_run(workdir, config)
        return False
    if any(not name.startswith(f".{RECORD}.") and name not in _spared(config) for name in names):
        raise UserError(f"--workdir={workdir} is not empty and holds no run; name a new or empty directory")
    return True


def _spared(config: Any) -> tuple[str, ...]:
    """What outlasts a run that could not be set up, and may be there before a new one: the run that makes its base."""
    return (BASE,) if config.model.base else ()


@contextlib.contextmanager
def setting_up(workdir: Workdir, config: Any, *, devices: str, write: bool, tasks: str = "") -> Iterator[None]:
    """Records a run's configuration around the work that may still find a mistake in it.

    A new run's record stands from the beginning, so that the same command resumes what a kill left behind; after a
    UserError nothing is left of the directory but the run that makes the base, for the next try to begin with. A run
    that resumes keeps its old record until the work is done.

    Args:
      workdir: the directory.
      config: a dataclass, resolved.
      devices: their description, recorded.
      write: whether this process records the configuration (process 0 does).
      tasks: digest of what is trained on, recorded; "" where nothing is trained.

    Raises:
      UserError: see `check_workdir`; the run began with other tasks; or the place is not writable.
    """
    new = check_workdir(workdir, config)
    if tasks and not new:
        _check_same_tasks(workdir, tasks)
    record = {
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "revision": git_revision(),
        "devices": devices,
    }
    record |= {"tasks": tasks} if tasks else {}
    directory, existed = workdir.path, workdir.path.exists()
    try:
        if new and write:
            _record(workdir, record)
        yield
        if not new and write:
            _record(workdir, record)
    except UserError:
        if new and write and directory.is_dir():
            for path in directory.iterdir():
                if path.name not in _spared(config):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not existed and not any(directory.iterdir()):
                directory.rmdir()
        raise


def _check_same_tasks(workdir: Workdir, tasks: str) -> None:
    before = json.loads((workdir.path / RECORD).read_text(encoding="utf-8")).get("tasks")
    if before is None:
        logging.warning("%s does not record what it trained on; taken to be today's prompts", workdir)
    elif before != tasks:
        raise UserError(
            f"--workdir={workdir} was started with other prompts or distributions to train on (digest "
            f"{before[:12]}, now {tasks[:12]}); restore the rows of config.data.custom, or name a new --workdir"
        )


def _record(workdir: Workdir, record: Mapping[str, Any]) -> None:
    try:
        write_json(workdir.path / RECORD, record)
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror or error}; name another one") from error


def _check_same_run(workdir: Workdir, config: Any) -> None:
    """Refuses to resume a run whose configuration differs where it may not, naming each field with both values."""
    # JSON has no tuples; a record of an earlier version lacks fields that came since, whose defaults it followed.
    defaults, now = (json.loads(json.dumps(dataclasses.asdict(it))) for it in (type(config)(), config))
    recorded = read_config(workdir.path)
    before, unset, after = (flatten_dict(values, sep=".") for values in (recorded, defaults, now))
    before = unset | before
    changed = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds a run of another config: {'; '.join(changed)}. Name a new --workdir, or "
            f"restore these fields (only {', '.join(MAY_CHANGE)} may change on resume)"
        )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_revision() -> str:
    """Commit of the code, with "+" where it has local changes; "unknown" outside a checkout."""
    command = ("git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+")
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
