"""Checkpoints of a training run: asynchronous, atomic, the newest few kept, checked bit for bit when read."""

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cft_jax.checkpoints.fingerprint import fingerprint
from cft_jax.common.errors import UserError

# What reading a damaged checkpoint raises: JSON and tensorstore errors are ValueErrors, missing files OSErrors,
# missing entries KeyErrors, entries of another kind TypeErrors and AttributeErrors.
_DAMAGE = (ValueError, OSError, KeyError, TypeError, AttributeError)


class Restored(NamedTuple):
    """What a checkpoint held: the number of steps done, the state, and what was recorded beside it."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The directory `checkpoints/` of a run, one subdirectory per saved step.

    A checkpoint appears under its name when it is complete, never before. It carries a fingerprint of its state, which
    is compared when it is read. All processes call every method.
    """

    def __init__(self, directory: Path | epath.Path, *, keep: int, read_only: bool = False) -> None:
        """Opens the directory, making it if absent, and removes what an interrupted save left behind.

        Args:
          directory: of the checkpoints; local, or on an object store.
          keep: how many of the newest are kept.
          read_only: change nothing there, not even damaged checkpoints: the run may be under way.
        """
        path = str(directory)
        # `absolute` would take an address for the name of a directory.
        self._directory = epath.Path(path if "://" in path else Path(path).absolute())
        self._read_only = read_only
        options: dict[str, Any] = {"max_to_keep": keep, "cleanup_tmp_directories": True}
        if read_only:
            options = {"create": False, "save_interval_steps": 0, "enable_async_checkpointing": False}
        self._manager = ocp.CheckpointManager(
            self._directory, options=ocp.CheckpointManagerOptions(**options, read_only=read_only)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for saves under way and lets go of the directory.

        Raises:
          UserError: the disk is full.
        """
        with self._clear_errors():
            self._manager.wait_until_finished()
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps saved completely, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Starts saving; returns as soon as the state has been copied and may be overwritten.

        Args:
          step: number of steps done.
          state: pytree of arrays.
          metadata: anything JSON holds.

        Raises:
          UserError: the disk is full (now, or when the previous save ended).
        """
        record = {**metadata, "step": step, "fingerprint": fingerprint(state)}
        with self._clear_errors():
            parts = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record))
            self._manager.save(step, args=parts)

    def restore(self, target: Any, check: Callable[[Mapping[str, Any]], None]) -> Restored | None:
        """Reads the newest checkpoint that is whole; damaged ones are set aside as `<step>.damaged`, with a warning.

        Args:
          target: pytree of arrays or ShapeDtypeStructs with the wanted shapes, dtypes and shardings. The mesh may
            differ from the one that saved.
          check: called with the metadata before the state is read; raises UserError if the checkpoint does not belong
            to this run.

        Returns:
          The state equal to the saved one bit for bit; None if nothing was saved yet.

        Raises:
          UserError: no checkpoint can be read.
        """
        steps = self.steps
        for step in reversed(steps):
            metadata = self._attempt(self._read_metadata, step)
            if metadata is None:
                continue
            check(metadata)
            state = self._attempt(self._read_state, step, target, metadata)
            if state is not None:
                return Restored(step, state, metadata)
        if steps:
            raise UserError(
                f"no checkpoint in {self._directory} can be read (steps {', '.join(map(str, steps))}); "
                "start again in a new --workdir"
            )
        return None

    def _attempt(self, read: Callable[..., Any], step: int, *args: Any) -> Any:
        """What `read` returns; None, with the checkpoint set aside, if any process found it damaged."""
        value, reason = None, ""
        try:
            value = read(step, *args)
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if np.all(multihost_utils.process_allgather(np.array(value is not None))):
            return value
        logging.warning("checkpoint %s is damaged (%s); trying the one before", self._directory / str(step), reason)
        if self._read_only:
            return None
        if jax.process_index() == 0:
            aside = self._directory / f"{step}.damaged"
            if aside.exists():
                aside.rmtree()
            (self._directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()
        return None

    def _read_metadata(self, step: int) -> dict[str, Any]:
        metadata = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if metadata["step"] != step or not isinstance(metadata["fingerprint"], str):
            raise ValueError("its metadata belong to another step")
        return metadata

    def _read_state(self, step: int, target: Any, metadata: Mapping[str, Any]) -> Any:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
        if fingerprint(state) != metadata["fingerprint"]:
            raise ValueError("its contents differ from what was saved")
        return state

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turns a full disk, which tensorstore reports as a ValueError, into one clear line."""
        try:
            yield
        except (OSError, ValueError) as error:
            text = str(error)
            if "No space left" in text or "RESOURCE_EXHAUSTED" in text or getattr(error, "errno", 0) == errno.ENOSPC:
                raise UserError(
                    f"no space left for a checkpoint in {self._directory}; free some, or lower config.checkpoint.keep, "
                    "and repeat the command: the run resumes from the last complete checkpoint"
                ) from error
            raise
