"""The logged metrics where people watch them: TensorBoard and Weights & Biases, when the configuration asks."""

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.config import LogConfig


class Dashboards(contextlib.ExitStack):
    """Receives each row of `metrics.jsonl` as it is written.

    TensorBoard reads `workdir/tensorboard`. Weights & Biases takes its settings from its own WANDB_* variables; a run
    that resumes is continued there too, by an id kept in `workdir/wandb_run_id`.
    """

    def __init__(self, log: LogConfig, workdir: Path, *, enabled: bool) -> None:
        """Opens what is asked for, where this process writes (`enabled`).

        Raises:
          UserError: a package is not installed.
        """
        super().__init__()
        self._tensorboard = self._wandb = None
        if log.tensorboard and enabled:
            self._tensorboard = _package("tensorboardX", "tensorboard").SummaryWriter(str(workdir / "tensorboard"))
            self.callback(self._tensorboard.close)
        if log.wandb and enabled:
            wandb = _package("wandb", "wandb")
            kept = workdir / "wandb_run_id"
            if not kept.exists():
                kept.write_text(wandb.util.generate_id(), encoding="utf-8")
            run_id = kept.read_text(encoding="utf-8")
            self._wandb = wandb.init(dir=str(workdir), id=run_id, resume="allow", name=workdir.name)
            self.callback(self._wandb.finish)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Passes on one row."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


def _package(name: str, field: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"config.log.{field} needs a package that is absent; pip install {name}") from None
