"""What a run starts from: a checkpoint with its tokenizer, from the hub, from a directory, or randomly initialised."""

import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cft_jax.checkpoints import from_pretrained, write_random_llama
from cft_jax.checkpoints.hf_io import model_config
from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.config import Config, ModelSettings, ScratchConfig
from cft_jax.distributions import Task
from cft_jax.models.config import GatedMlp, LayerSpec, LoraSpec, ModelConfig, Rope
from cft_jax.models.memory import Batch, MemoryEstimate, device_memory, estimate_memory, require_memory
from cft_jax.models.transformer import Transformer
from cft_jax.text import load_tokenizer, terminator_id
from cft_jax.text.scratch import save_tokenizer, train_tokenizer

# Written last, so that a directory that has it is whole.
_LAST_FILE = "tokenizer.json"
_SCRATCH_THETA = 10_000.0
_SCRATCH_NORM_EPS = 1e-5


def base_checkpoint(config: Config, tasks: Mapping[str, Sequence[Task]], workdir: Workdir) -> str:
    """Directory or hub id of the base model; one that the run makes lies in the workdir and is made once."""
    if not config.model.scratch.enabled:
        return config.model.checkpoint
    directory = workdir.path / "base"
    if jax.process_index() == 0 and not (directory / _LAST_FILE).exists():
        shutil.rmtree(directory, ignore_errors=True)
        _make(directory, config, itertools.chain.from_iterable(tasks.values()))
        workdir.publish()
    multihost_utils.sync_global_devices("base")
    if jax.process_index() > 0:
        workdir.fetch("base")
    return str(directory)


def base_of_run(config: Config, workdir: Path) -> str:
    """Directory or hub id of the base model of a run that has been started; makes none.

    Raises:
      UserError: the run made it and it is gone.
    """
    if not config.model.scratch.enabled:
        return config.model.checkpoint
    directory = workdir / "base"
    if not (directory / _LAST_FILE).exists():
        raise UserError(f"{directory} is gone, the base model that this run began with; bring it back or train again")
    return str(directory)


def _make(directory: Path, config: Config, tasks: Iterable[Task]) -> None:
    tokenizer = scratch_tokenizer(tasks)
    model = scratch_model(config.model.scratch, vocab_size=len(tokenizer))
    write_random_llama(
        directory,
        config=model,
        seed=config.seed,
        dtype="float32",
        eos_token_id=terminator_id(tokenizer, "tokenizer_eos"),
        max_length=max(config.data.max_length, config.eval.max_new_tokens),
    )
    save_tokenizer(tokenizer, directory)
    logging.info("made a model with a vocabulary of %d in %s", model.vocab_size, directory)


def scratch_tokenizer(tasks: Iterable[Task]) -> PreTrainedTokenizerFast:
    """The tokenizer of a model trained from scratch, fitted to the tasks' prompts and listed values."""
    texts = []
    for task in tasks:
        texts += [message["content"] for message in task.messages]
        texts += [] if task.space is None else task.space.values
    return train_tokenizer(texts)


def scratch_model(scratch: ScratchConfig, *, vocab_size: int) -> ModelConfig:
    """The architecture of a model trained from scratch: Llama's, with a tied head."""
    return ModelConfig(
        num_layers=scratch.num_layers,
        embed_dim=scratch.embed_dim,
        num_heads=scratch.num_heads,
        num_kv_heads=scratch.num_kv_heads,
        head_dim=scratch.head_dim,
        vocab_size=vocab_size,
        layer_pattern=(LayerSpec(None, Rope(_SCRATCH_THETA)),),
        mlp=GatedMlp(scratch.hidden_dim, "silu"),
        norm_eps=_SCRATCH_NORM_EPS,
        attn_scale=scratch.head_dim**-0.5,
        tie_head=True,
    )


def base_tokenizer(settings: ModelSettings, checkpoint: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or the one that `model.tokenizer` names.

    Raises:
      UserError: see `load_tokenizer`.
    """
    named = settings.tokenizer or checkpoint
    return load_tokenizer(named, revision=settings.revision, local_files_only=settings.local_files_only)


def check_vocabulary(settings: ModelSettings, checkpoint: str, *, highest_id: int) -> None:
    """Refuses a tokenizer that writes tokens which the model lacks: indexing on devices would not complain.

    Args:
      settings: of the run.
      checkpoint: of the base model.
      highest_id: of the tokens in the data.

    Raises:
      UserError: it is beyond the model's vocabulary.
    """
    size = _architecture(settings, checkpoint).vocab_size
    if highest_id >= size:
        named = (
            f"config.model.tokenizer={settings.tokenizer}" if settings.tokenizer else f"the tokenizer of {checkpoint}"
        )
        raise UserError(
            f"{named} writes token {highest_id}, and the vocabulary of {checkpoint} ends at {size - 1}; give the "
            "tokenizer that belongs to the model"
        )


def _architecture(settings: ModelSettings, checkpoint: str) -> ModelConfig:
    return model_config(checkpoint, revision=settings.revision, local_files_only=settings.local_files_only)


def check_memory(config: Config, checkpoint: str, mesh: Mesh, *, rows: int, length: int) -> MemoryEstimate:
    """What training takes on each device, worked out before anything is loaded.

    Args:
      config: of the run.
      checkpoint: of the base model.
      mesh: that it will lie on.
      rows: of a batch, over all devices.
      length: tokens of a row.

    Raises:
      UserError: it cannot fit; or see `model_config`.
    """
    settings = config.model
    lora = _lora(settings)
    estimate = estimate_memory(
        _architecture(settings, checkpoint),
        lora=lora,
        dtype=settings.dtype,
        param_dtype=settings.dtype if lora else "float32",
        mesh=mesh,
        batch=Batch(-(-rows // config.train.grad_accum_steps), length),
        remat=settings.remat,
    )
    require_memory(estimate, device_memory())
    return estimate


def load_model(config: Config, checkpoint: str, mesh: Mesh) -> Transformer:
    """The model to train, on the mesh; the trained weights are float32, frozen ones in `model.dtype`.

    Raises:
      UserError: see `from_pretrained`.
    """
    settings = config.model
    lora = _lora(settings)
    return from_pretrained(
        checkpoint,
        dtype=settings.dtype,
        param_dtype=settings.dtype if lora else "float32",
        mesh=mesh,
        lora=lora,
        adapter=settings.adapter or None,
        revision=settings.revision,
        local_files_only=settings.local_files_only,
        remat=settings.remat,
        seed=config.seed,
    )


def _lora(settings: ModelSettings) -> LoraSpec | None:
    lora = settings.lora
    return LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.targets) if lora.enabled else None
