"""A run's directory: what it was started with, and whether it may go on or is finished."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_json

# What may differ when a run is resumed, as paths in the config; everything else shapes the weights.
MAY_CHANGE = ("train.max_steps", "mesh", "log", "checkpoint", "eval", "export")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy", "scipy")


def open_workdir(workdir: Path, config: Any, *, devices: str, write: bool) -> None:
    """Makes the run's directory, or checks that it holds the same run.

    Args:
      workdir: the directory.
      config: a dataclass, the resolved configuration.
      devices: description of the devices, recorded.
      write: whether this process records the configuration (process 0 does).

    Raises:
      UserError: the directory belongs to a run of another configuration (the fields are named), or holds other files.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    record = workdir / "config.json"
    if record.exists():
        check_same_run(read_config(workdir), values, workdir)
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir={workdir} is not empty and holds no run; name a new or empty directory")
    if write:
        write_json(record, {"config": values, "versions": versions(), "revision": git_revision(), "devices": devices})


def read_config(workdir: Path) -> dict[str, Any]:
    """The configuration that a run's directory records.

    Raises:
      UserError: there is none, or it is damaged.
    """
    record = workdir / "config.json"
    try:
        return json.loads(record.read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no config.json; it is not the directory of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error}); start in a new --workdir") from None


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], workdir: Path) -> None:
    """Refuses to go on with a run whose configuration differs where it may not.

    Raises:
      UserError: naming each field with its saved and its present value.
    """
    before, after = _flat(saved), _flat(now)
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
    root = Path(__file__).parents[2]

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"
    except FileNotFoundError:
        return "unknown"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found
