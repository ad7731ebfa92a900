"""The logged metrics where people watch them: TensorBoard and Weights & Biases, when the configuration asks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cft_jax.common.errors import UserError
from cft_jax.config import LogConfig

Mirror = Callable[[int, Mapping[str, float]], None]


class Dashboards:
    """Receives each row of `metrics.jsonl` as it is written.

    TensorBoard reads `workdir/tensorboard`. Weights & Biases takes its settings from its own WANDB_* variables; a run
    that resumes is continued there too, by an id kept in `workdir/wandb_run_id`.
    """

    def __init__(self, log: LogConfig, workdir: Path, *, enabled: bool) -> None:
        """Opens what is asked for.

        Args:
          log: which of them are wanted.
          workdir: of the run.
          enabled: whether this process writes; process 0 does.

        Raises:
          UserError: a package is not installed.
        """
        self._tensorboard = _tensorboard(workdir) if log.tensorboard and enabled else None
        self._wandb = _wandb(workdir) if log.wandb and enabled else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Passes on one row."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Flushes and lets go."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(workdir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("config.log.tensorboard needs a package that is absent; pip install tensorboardX") from None
    return SummaryWriter(str(workdir / "tensorboard"))


def _wandb(workdir: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("config.log.wandb needs a package that is absent; pip install wandb") from None
    kept = workdir / "wandb_run_id"
    if not kept.exists():
        kept.write_text(wandb.util.generate_id(), encoding="utf-8")
    return wandb.init(dir=str(workdir), id=kept.read_text(encoding="utf-8"), resume="allow", name=workdir.name)
