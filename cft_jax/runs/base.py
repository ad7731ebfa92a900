"""What a run starts from: a checkpoint with its tokenizer, from the hub, from a directory, or randomly initialised."""

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh
from transformers import PreTrainedTokenizerBase

from cft_jax.checkpoints import from_pretrained
from cft_jax.checkpoints.hf_io import model_config
from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.config import Config, ModelSettings, load_config, validate
from cft_jax.distributions import Task, configured_tasks
from cft_jax.models.config import LoraSpec, ModelConfig
from cft_jax.models.memory import Batch, MemoryEstimate, device_memory, estimate_memory, micro_batches, require_memory
from cft_jax.models.transformer import Transformer
from cft_jax.runs.scratch import LAST_FILE, make_base, scratch_tokenizer
from cft_jax.sharding.mesh import platform
from cft_jax.text import load_tokenizer
from cft_jax.text.scratch import save_tokenizer

# What a run makes to begin with: a randomly initialised model, or a run of its own whose export is the model.
BASE = "base"


def base_config(config: Config) -> Config:
    """The configuration of the run that makes the model which `config` begins with; its `model.base` names one.

    That run is not evaluated: what begins with its model is, before training.

    Raises:
      UserError: there is no such config, or it is wrong; or it exports an adapter.
    """
    named = f"config.model.base={config.model.base}"
    try:
        made = load_config(config.model.base)
        made = dataclasses.replace(made, eval=dataclasses.replace(made.eval, enabled=False))
        validate(made)
    except UserError as error:
        raise UserError(f"{named}: {error}") from error
    if not made.export.enabled or made.export.format != "merged":
        raise UserError(f"{named} exports no whole model; set export.enabled=True and export.format=merged there")
    return made


def base_checkpoint(config: Config, tasks: Mapping[str, Sequence[Task]], workdir: Workdir) -> str:
    """Directory or hub id of the base model; one of random weights is made once and lies in the workdir."""
    if not config.model.scratch.enabled:
        return base_of_run(config, workdir)
    directory = workdir.path / BASE
    if jax.process_index() == 0 and not (directory / LAST_FILE).exists():
        shutil.rmtree(directory, ignore_errors=True)
        make_base(directory, config, itertools.chain.from_iterable(tasks.values()))
        workdir.publish()
    multihost_utils.sync_global_devices("base")
    if jax.process_index() > 0:
        workdir.fetch(BASE)
    return str(directory)


def base_of_run(config: Config, workdir: Workdir) -> str:
    """Directory or hub id of the base model of a run that has been started; makes none.

    Raises:
      UserError: the run made it and it is gone.
    """
    model = config.model
    if not model.scratch.enabled and not model.base:
        return model.checkpoint
    directory = workdir.path / BASE / "export" if model.base else workdir.path / BASE
    if not (directory / LAST_FILE).exists():
        raise UserError(f"{directory} is gone, the base model that this run began with; bring it back or train again")
    return str(directory)


def base_tokenizer(settings: ModelSettings, checkpoint: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or the one that `model.tokenizer` names; see `load_tokenizer`."""
    named = settings.tokenizer or checkpoint
    return load_tokenizer(named, revision=settings.revision, local_files_only=settings.local_files_only)


def run_tokenizer(config: Config, tasks: Mapping[str, Sequence[Task]]) -> PreTrainedTokenizerBase:
    """The tokenizer that a run of the configuration will have, before its base model is made.

    Raises:
      UserError: see `base_tokenizer`.
    """
    if config.model.base and not config.model.tokenizer:
        made = base_config(config)
        return run_tokenizer(made, configured_tasks(made.data))
    if not config.model.scratch.enabled:
        return base_tokenizer(config.model, config.model.checkpoint)
    # As the main job will load it: its fingerprint is part of the data cache's key.
    with tempfile.TemporaryDirectory() as directory:
        save_tokenizer(scratch_tokenizer(itertools.chain.from_iterable(tasks.values())), Path(directory))
        return base_tokenizer(config.model, directory)


def check_vocabulary(settings: ModelSettings, checkpoint: str, *, highest_id: int) -> None:
    """Refuses a tokenizer that writes tokens which the model lacks: indexing on devices would not complain.

    Raises:
      UserError: the highest id in the data is beyond the model's vocabulary.
    """
    size = architecture(settings, checkpoint).vocab_size
    if highest_id >= size:
        named = (
            f"config.model.tokenizer={settings.tokenizer}" if settings.tokenizer else f"the tokenizer of {checkpoint}"
        )
        raise UserError(
            f"{named} writes token {highest_id}, and the vocabulary of {checkpoint} ends at {size - 1}; give the "
            "tokenizer that belongs to the model"
        )


def architecture(settings: ModelSettings, checkpoint: str) -> ModelConfig:
    """Sizes of a checkpoint's model; see `model_config`."""
    return model_config(checkpoint, revision=settings.revision, local_files_only=settings.local_files_only)


def check_memory(config: Config, checkpoint: str, mesh: Mesh, *, rows: int, length: int) -> MemoryEstimate:
    """What training takes on each device, worked out before anything is loaded; a batch has `rows` of `length` tokens.

    Raises:
      UserError: it cannot fit; or see `model_config`.
    """
    model, options = architecture(config.model, checkpoint), model_options(config.model, mesh)
    left_open = {"lora": options["lora"], "platform": platform(mesh)}
    parts = config.train.grad_accum_steps or micro_batches(model, Batch(rows, length), mesh, **left_open)
    estimate = estimate_memory(model, batch=Batch(-(-rows // parts), length), **options)
    available = device_memory()
    require_memory(estimate, available)
    if available is not None and estimate.total > available:
        logging.warning(
            "by the estimate training takes %.1f GiB of each device, which has %.1f; python -m cft_jax.plan finds "
            "settings that fit",
            *(size / 2**30 for size in (estimate.total, available)),
        )
    return estimate


def load_model(config: Config, checkpoint: str, mesh: Mesh, workdir: Workdir | None = None) -> Transformer:
    """The model to train, on the mesh (see `from_pretrained`); trained weights are float32, frozen in `model.dtype`.

    Of a base that lies in `workdir`, the run's, its place there is what exported adapters name.
    """
    settings = config.model
    model = from_pretrained(
        checkpoint,
        adapter=settings.adapter or None,
        revision=settings.revision,
        local_files_only=settings.local_files_only,
        seed=config.seed,
        **model_options(settings, mesh),
    )
    if workdir is not None and Path(checkpoint).is_relative_to(workdir.path):
        place = workdir.origin / Path(checkpoint).relative_to(workdir.path).as_posix()
        assert model.source is not None
        model.source = dataclasses.replace(model.source, name=str(place))
    return model


def model_options(settings: ModelSettings, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """How the model lies in memory: keywords of `from_pretrained` and of `abstract_model`."""
    lora, dtype = settings.lora, settings.dtype
    spec = LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.targets, lora.float32) if lora.enabled else None
    param_dtype = dtype if lora.enabled else "float32"
    remat = settings.remat
    if remat == "auto":
        # What a TPU or GPU keeps goes through a memory slower than its arithmetic.
        remat = "none" if isinstance(mesh, Mesh) and platform(mesh) == "cpu" else "dots"
    return {"lora": spec, "dtype": dtype, "param_dtype": param_dtype, "mesh": mesh, "remat": remat}
