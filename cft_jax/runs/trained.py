"""A run's trained weights: from its newest checkpoint into the model, and out in Hugging Face format."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from cft_jax.checkpoints.orbax_io import Checkpoints
from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.config import Config, MeshConfig
from cft_jax.generate.stops import end_at
from cft_jax.models.transformer import Transformer
from cft_jax.runs.base import base_of_run, base_tokenizer, load_model
from cft_jax.sharding.mesh import make_mesh, mesh_sizes
from cft_jax.train.loop import base_identity, check_same
from cft_jax.train.optimizer import adamw
from cft_jax.train.state import abstract_state, split_model


def load_trained(
    workdir: Workdir, config: Config, *, mesh: MeshConfig | None = None, dtype: str = ""
) -> tuple[Transformer, PreTrainedTokenizerBase, int]:
    """The model of a run with the weights of its newest whole checkpoint, its tokenizer, and that checkpoint's step.

    Args:
      workdir: of the run.
      config: of the run.
      mesh: what is asked for; by default the run's own, or where that does not fit the devices here, no cutting.
      dtype: of activations and matrix products; empty for the run's own. Weights stay what they are.

    Raises:
      UserError: the run has no checkpoint, or its base model is gone or another one; or see `make_mesh`.
    """
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir} has no checkpoints yet; train first with cft_jax.main")
    base = base_of_run(config, workdir)
    tokenizer = base_tokenizer(config.model, base)
    if config.model.lora.enabled:
        # The checkpoint holds the adapters; the one that training started from may be gone.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, adapter=""))
    model = load_model(config, base, _mesh(config.mesh, mesh), workdir)
    end_at(model, tokenizer, config.data.terminator)
    parts, weights, frozen = split_model(model)

    optimizer = adamw(weight_decay=config.train.weight_decay, max_grad_norm=config.train.max_grad_norm)
    with Checkpoints(workdir.checkpoints, keep=config.checkpoint.keep, read_only=True) as checkpoints:
        same_base = functools.partial(check_same, base_identity(model, frozen))
        restored = checkpoints.restore(abstract_state(weights, optimizer), same_base)
    if restored is None:
        raise UserError(f"{workdir} has no complete checkpoint yet; train first with cft_jax.main")
    parts.update(model, restored.state.weights)
    if dtype and dtype != config.model.dtype:
        logging.warning(
            "%s was trained in %s and is asked in config.model.dtype=%s", workdir, config.model.dtype, dtype
        )
        model.dtype = jnp.dtype(dtype)
    return model, tokenizer, restored.step


def _mesh(recorded: MeshConfig, asked: MeshConfig | None) -> Mesh:
    """The mesh that is asked for; where that is no other than the run's or the default, the run's if it fits."""
    if asked is None or asked in (recorded, MeshConfig()):
        try:
            mesh_sizes(recorded.data, recorded.fsdp, recorded.tensor, count=jax.device_count())
            asked = recorded
        except UserError:
            asked = MeshConfig()
    return make_mesh(asked.data, asked.fsdp, asked.tensor)
