"""The training loop: batches in, checkpoints and metrics out, the same weights whatever interrupts it."""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Int32

from cft_jax.checkpoints.fingerprint import fingerprint, settings_digest
from cft_jax.checkpoints.orbax_io import Checkpoints
from cft_jax.common.errors import UserError
from cft_jax.common.progress import Progress
from cft_jax.common.storage import Workdir
from cft_jax.common.writer import MetricsWriter
from cft_jax.config import CheckpointConfig, LogConfig, TrainConfig
from cft_jax.data.batch import TargetBatch
from cft_jax.data.kept import KeptTexts
from cft_jax.models.flops import Operations, all_devices_peak
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.batch_loss import DeviceBatch, head_options
from cft_jax.train.dashboards import Dashboards
from cft_jax.train.keep import DeviceKept, keep_options
from cft_jax.train.ledger import Ledger, NotFiniteError
from cft_jax.train.optimizer import adamw, warmup_cosine
from cft_jax.train.preemption import preemption_watch
from cft_jax.train.prefetch import prefetched, put_batch, put_kept
from cft_jax.train.profile import ProfileWindow
from cft_jax.train.remembered import remember_base
from cft_jax.train.state import abstract_state, initial_state, split_model, state_shardings
from cft_jax.train.step import StepOptions, make_train_step


@runtime_checkable
class Batches(Protocol):
    """The data of a run; `cft_jax.data.dataset.Dataset` is one.

    An epoch has `steps_per_epoch` batches and `num_examples` strings (prompts for `exact`). All prompts begin with the
    tokens `shared_prefix`, which the batches leave out.
    """

    shared_prefix: Int32[np.ndarray, "_"]

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def num_examples(self) -> int: ...

    def batch(self, step: int) -> TargetBatch:
        """The batch of a step, counted from 0 through all epochs; a function of the step alone."""
        ...

    def task_names(self, step: int) -> Sequence[str]:
        """The tasks that a step visits."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
      step: number of steps done.
      stop: number that were to be done.
      preempted: whether SIGTERM stopped it before; the state was saved.
      skipped: updates left out because loss or gradient was not finite.
    """

    step: int
    stop: int
    preempted: bool
    skipped: int


class NonFiniteLossError(UserError):
    """The loss or its gradient was not finite; the message names the step, its examples and the last checkpoint."""


def train(
    model: Transformer,
    dataset: Batches,
    *,
    target: str,
    seed: int,
    train: TrainConfig,
    checkpoint: CheckpointConfig,
    log: LogConfig,
    workdir: Workdir,
    identity: Mapping[str, Any],
    kept: KeptTexts | None = None,
) -> TrainResult:
    """Trains the model's adapters, or all its weights if it has none, and leaves it with the trained weights.

    Resumes from the newest whole checkpoint in `workdir/checkpoints`. A run that was interrupted and resumed with the
    same mesh and processes gives the same weights, bit for bit, as one left alone: a step is a function of the state
    and the step's number. The schedule spans all epochs; `train.max_steps` only stops earlier.

    Args:
      model: on a mesh. Its trained weights are used up while this runs, and gone if it raises.
      dataset: see `Batches`.
      target: "soft" or "hard".
      seed: of the dropout.
      train: objective, optimizer, schedule.
      checkpoint: when to save, and how many to keep.
      log: when to log.
      workdir: of the run; gets `checkpoints/` and `metrics.jsonl`.
      identity: whatever else tells this run from others (JSON); a checkpoint that records something else is refused.
      kept: the texts of a run that keeps some.

    Raises:
      UserError: the checkpoints belong to another run or other base weights, or all are damaged; the disk is full;
        the devices' memory is.
      NonFiniteLossError: the loss or its gradient was not finite and `train.on_nonfinite` is "stop".
    """
    if (mesh := model.mesh) is None:
        raise ValueError("the model must lie on a mesh")
    per_epoch = dataset.steps_per_epoch
    total = per_epoch * train.epochs
    stop = min(total, train.max_steps) if train.max_steps else total
    save_every = checkpoint.every_steps or per_epoch
    profile = ProfileWindow(log.profile, workdir.path / "profile")
    parts, weights, frozen = split_model(model)
    count = sum(weight.size for weight in weights.values())
    prefix = tuple(dataset.shared_prefix.tolist())
    options = step_options(model, train, target=target, seed=seed, shared_prefix=prefix, total_steps=total)
    optimizer = options.optimizer
    train_step = make_train_step(parts, options, state_shardings(weights, optimizer))
    record = {**identity, "steps_per_epoch": per_epoch, **base_identity(model, frozen)}
    if kept is not None:
        record["kept"] = kept.digest()
        if options.keep is not None and options.keep.needs_remembering:
            # Of a model that is trained in full nothing is frozen; what it is kept to is made of these again.
            record["kept_base"] = fingerprint(weights)
        frozen, kept = remember_base(model, frozen, kept, options.keep, steps=stop)

    def load(step: int) -> tuple[DeviceBatch, DeviceKept | None]:
        rows = put_batch(dataset.batch(step), mesh)
        return rows, None if kept is None else put_kept(kept.batch(step), mesh)

    with (
        _clear_memory_errors(),
        preemption_watch(enabled=checkpoint.on_preemption) as asked_to_stop,
        Checkpoints(workdir.checkpoints, keep=checkpoint.keep) as checkpoints,
    ):
        restored = checkpoints.restore(abstract_state(weights, optimizer), functools.partial(check_same, record))
        state = initial_state(weights, optimizer) if restored is None else restored.state
        done = 0 if restored is None else restored.step
        if done:
            logging.info("resuming after step %d", done)
        logging.info("training %s weights for %d steps, %d an epoch", f"{count:,}", stop, per_epoch)
        first = jax.process_index() == 0
        with (
            _named_by_tasks(dataset, checkpoints),
            Dashboards(log, workdir.path, enabled=first) as dashboards,
            Progress("train", total=stop, unit="step", done=done) as progress,
            Ledger(
                MetricsWriter(workdir.path / "metrics.jsonl", after_step=done, enabled=first, mirror=dashboards.write),
                progress,
                every=log.every_steps,
                done=done,
                stop=stop,
                steps_per_epoch=per_epoch,
                examples_per_step=dataset.num_examples / per_epoch,
                operations=Operations.of(model.config, lora=model.lora_spec is not None),
                peak=all_devices_peak(),
                stop_on_nonfinite=train.on_nonfinite == "stop",
            ) as ledger,
            profile,
            contextlib.closing(prefetched(load, start=done, stop=stop)) as batches,
        ):
            for batch, kept_rows in batches:
                done += 1
                profile.before(done)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, frozen, batch, kept_rows)
                ledger.add(done, metrics)
                profile.after(done, metrics)
                stopping = asked_to_stop(done)
                if stopping or done == stop or done % save_every == 0:
                    # Read first: a state saved here has no loss behind it that was not finite.
                    ledger.drain()
                    workdir.publish()
                    checkpoints.save(done, state, record)
                if stopping:
                    logging.warning("SIGTERM: saving step %d of %d before stopping", done, stop)
                    break
    parts.update(model, state.weights)
    return TrainResult(done, stop, preempted=done < stop, skipped=int(jax.device_get(state.skipped)))


def step_options(
    model: Transformer, train: TrainConfig, *, target: str, seed: int, shared_prefix: tuple[int, ...], total_steps: int
) -> StepOptions:
    """What shapes the steps of a run, of which there are `total_steps` in all epochs; see `train`."""
    return StepOptions(
        loss=head_options(target, tau=train.tau, softcap=model.config.final_softcap, mesh=model.mesh),
        shared_prefix=shared_prefix,
        micro_batches=train.grad_accum_steps,
        seed=seed,
        optimizer=adamw(weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm),
        learning_rate=functools.partial(
            warmup_cosine, peak=train.learning_rate, warmup_ratio=train.warmup_ratio, total_steps=total_steps
        ),
        keep=keep_options(model, train.keep),
    )


@contextlib.contextmanager
def _named_by_tasks(dataset: Batches, checkpoints: Checkpoints) -> Iterator[None]:
    """Says of a loss that is not finite what it was of."""
    try:
        yield
    except NotFiniteError as error:
        step, loss = error.args
        names = dataset.task_names(step - 1)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        saved = checkpoints.steps
        last = f"the last checkpoint is of step {saved[-1]}" if saved else "no checkpoint was saved yet"
        raise NonFiniteLossError(
            f"loss {loss} at step {step} or its gradient is not finite (examples {shown}); {last}. Lower "
            "config.train.learning_rate in a new --workdir, or set config.train.on_nonfinite=skip there"
        ) from error


def base_identity(model: Transformer, frozen: Mapping[str, Array]) -> dict[str, str]:
    """What tells the base model of a run from others, recorded in its checkpoints."""
    return {"base_weights": fingerprint(frozen), "architecture": settings_digest(model.config)}


def check_same(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another run; what it does not record (earlier versions had less) is taken for the same.

    Raises:
      UserError: naming what differs.
    """
    causes = {
        "base_weights": "trained on other base weights",
        "kept_base": "trained to keep another base",
        "architecture": "trained with another config.json",
    }
    for name, value in json.loads(json.dumps(record)).items():
        if name not in metadata:
            logging.warning("the checkpoint does not record its %s; taken to be this run's", name)
        elif metadata[name] != value:
            raise UserError(
                f"the checkpoints in this workdir are {causes.get(name, 'of another run')} ({name} was "
                f"{metadata[name]!r} and is {value!r}); bring the base model back, or name a new --workdir"
            )


@contextlib.contextmanager
def _clear_memory_errors() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the devices ran out of memory; cut the weights over more devices with config.mesh.fsdp; or, in a "
            "new --workdir, raise config.train.grad_accum_steps or set config.model.remat=full "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
