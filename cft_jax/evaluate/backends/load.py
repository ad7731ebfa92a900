"""The model that an evaluation measures, from whatever names it, ready to be sampled from and scored."""

from etils import epath
from transformers import PreTrainedTokenizerBase

from cft_jax.checkpoints import from_pretrained
from cft_jax.checkpoints.peft_files import is_adapter, read_adapter
from cft_jax.common import hub
from cft_jax.common.errors import UserError
from cft_jax.common.storage import CHECKPOINTS, opened, reaching
from cft_jax.config import Config, from_config_dict, read_config
from cft_jax.evaluate.backends.jax_backend import JaxBackend
from cft_jax.evaluate.backends.protocol import Backend, MeasuredModel
from cft_jax.generate.stops import all_stop_ids, end_at
from cft_jax.models.strength import set_strength
from cft_jax.runs.base import base_tokenizer
from cft_jax.runs.trained import load_trained
from cft_jax.sharding.mesh import make_mesh
from cft_jax.text import terminator_id

# The token after an assistant's turn in the chat template, at which all texts end anyway.
_OF_TEMPLATE = "auto"


def load_measured_model(config: Config) -> MeasuredModel:
    """The model that `config.model` names: a checkpoint, or the directory of a run of cft_jax.main, also on a store.

    Raises:
      UserError: there is no such checkpoint, or it cannot be loaded.
    """
    settings, what = config.model, config.model.checkpoint
    with reaching(what, "config.model.checkpoint"):
        is_run = (epath.Path(what).expanduser() / CHECKPOINTS).is_dir()
    if is_run and config.backend == "jax":
        with opened(what, write=False, flag="config.model.checkpoint") as run:
            recorded = from_config_dict(read_config(run.path))
            model, tokenizer, step = load_trained(run, recorded, mesh=config.mesh, dtype=settings.dtype)
        what = f"{what}, step {step}"
    else:
        if is_run:
            what = f"{what.rstrip('/')}/export"
            if not epath.Path(what).is_dir():
                raise UserError(f"{what} is missing, which backend=hf measures; run cft_jax.export first")
        tokenizer = base_tokenizer(settings, _tokenizer_place(what, config))
        if config.backend == "hf":
            return MeasuredModel(_hf_backend(what, config, tokenizer), tokenizer, what)
        model = from_pretrained(
            what,
            dtype=settings.dtype,
            param_dtype=settings.dtype,
            mesh=make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor),
            adapter=settings.adapter or None,
            revision=settings.revision,
            local_files_only=settings.local_files_only,
        )
    set_strength(model, settings.lora.strength, name=what)
    if config.data.terminator != _OF_TEMPLATE:
        end_at(model, tokenizer, config.data.terminator)
    return MeasuredModel(JaxBackend(model, tokenizer), tokenizer, what)


def _tokenizer_place(what: str, config: Config) -> str:
    """Where the tokenizer lies: with the weights, or, of an adapter that brings none, with its base."""
    if config.model.tokenizer:
        return what
    local = config.model.local_files_only
    directory, _ = hub.resolve(what, revision=config.model.revision, local_files_only=local)
    if is_adapter(directory) and not (directory / "tokenizer.json").exists():
        return read_adapter(str(directory), revision="", local_files_only=True).base
    return what


def _hf_backend(what: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> Backend:
    if config.model.adapter:
        raise UserError("with backend=hf give the adapter's own directory as config.model.checkpoint")
    if config.model.lora.strength != 1:
        raise UserError("config.model.lora.strength is not for backend=hf; measure what cft_jax.export writes with it")
    try:
        from cft_jax.evaluate.backends.hf_backend import HfBackend, load_hf_model
    except ImportError as error:
        raise UserError(f"backend=hf needs torch and peft ({error}): pip install -e '.[eval]'") from error
    settings = config.model
    model, named = load_hf_model(
        what, dtype=settings.dtype, revision=settings.revision, local_files_only=settings.local_files_only
    )
    if config.data.terminator != _OF_TEMPLATE:
        named.add(terminator_id(tokenizer, config.data.terminator))
    size = model.config.get_text_config().vocab_size
    return HfBackend(model, tokenizer, stop_ids=all_stop_ids(named, tokenizer, vocab_size=size))
