"""The Python face of the package, which `import cft_jax` offers: what the commands do, on the same settings."""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath

from cft_jax.ask import Model as Model
from cft_jax.ask import Task as Task
from cft_jax.ask import load as load
from cft_jax.ask.tasks import write_tasks
from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.errors import UserError as UserError
from cft_jax.common.storage import is_remote, opened
from cft_jax.config import RECORD, Config, changed
from cft_jax.jobs import calibrate as calibrate_job
from cft_jax.jobs import evaluate as evaluate_job

# What a model that is made from scratch needs: nothing of a base can be kept.
_SCRATCH = {
    "model": {"scratch": {"enabled": True}, "lora": {"enabled": False}, "dtype": "float32"},
    "export": {"format": "merged"},
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      workdir: its directory, or its address on a store, with report.html, export/ and the rest of the main command's
        files.
      summary: what its summary.json holds: the metrics before and after, by suite.
    """

    workdir: epath.Path
    summary: Mapping[str, Any]

    def __fspath__(self) -> str:
        return str(self.workdir)

    def load(self, **settings: Any) -> Model:
        """The trained model; see `cft_jax.load`."""
        return load(self, **settings)


def calibrate(
    base: str | os.PathLike[str] | None,
    tasks: Iterable[Task] | str | os.PathLike[str],
    *,
    workdir: str | os.PathLike[str] = "runs/python",
    **settings: Any,
) -> Run:
    """Trains a model on tasks: the main command. Called again with the same arguments, it resumes or is finished.

    Args:
      base: a directory in Hugging Face format or a hub id; None makes a small model from scratch.
      tasks: what to train on; or the path of a JSONL file, as `config.data.custom` takes. Tasks made in Python are
        kept beside the workdir, in `WORKDIR.jsonl`.
      workdir: directory of the run, or its address on a store; absent, empty, or of the same run.
      **settings: fields of the configuration, nested as there: `train={"objective": "exact", "epochs": 50}`.

    Returns:
      The run, with metrics before and after.

    Raises:
      UserError: a task, a setting or the base is wrong, or the workdir holds something else.
    """
    prepare_compilers()
    config = changed(Config(), _SCRATCH if base is None else {"model": {"checkpoint": os.fspath(base)}})
    config = changed(config, settings)
    written = False
    if isinstance(tasks, str | os.PathLike):
        file = Path(tasks)
    elif is_remote(workdir):
        raise UserError(f"workdir={workdir} is no local directory, beside which tasks are kept; give them as a file")
    else:
        file = Path(f"{os.fspath(workdir).rstrip('/')}.jsonl")
        written = write_tasks(file, tasks)
    config = changed(config, {"data": {"custom": str(file)}})
    try:
        with opened(os.fspath(workdir), write=jax.process_index() == 0, flag="workdir") as place:
            return Run(place.origin, calibrate_job.run(config, place))
    except BaseException:
        # Where no run has begun with them, other tasks may be given the next time.
        if written and not (Path(workdir) / RECORD).exists():
            file.unlink(missing_ok=True)
        raise


def evaluate(
    model: Model | str | os.PathLike[str],
    suite: str = "structured",
    *,
    workdir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Mapping[str, Any]:
    """Measures a model by a suite: the evaluate command.

    Args:
      model: from `load`, or what `load` takes.
      suite: structured, questions, open_random, mcq, noveltybench, perplexity, retention, or all.
      workdir: directory of the results, or its address on a store, where an interrupted evaluation resumes; None keeps
        no files.
      **settings: fields of the configuration, nested as there: `eval={"num_samples": 200}`.

    Returns:
      What the suite's summary.json holds.

    Raises:
      UserError: the model cannot be loaded, a setting is wrong, or the suite lacks something.
    """
    model = model if isinstance(model, Model) else load(model)
    config = changed(changed(model.config, {"eval": {"suites": (suite,)}}), settings)
    with contextlib.ExitStack() as places:
        directory = places.enter_context(tempfile.TemporaryDirectory()) if workdir is None else os.fspath(workdir)
        place = places.enter_context(opened(directory, write=jax.process_index() == 0, flag="workdir"))
        return evaluate_job.run(config, place, model.measured)
