"""A run's trained weights: from its newest checkpoint into the model, and out in Hugging Face format."""

import dataclasses
import functools

from transformers import PreTrainedTokenizerBase

from cft_jax.checkpoints.orbax_io import Checkpoints
from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.config import Config
from cft_jax.generate.stops import end_at
from cft_jax.models.transformer import Transformer
from cft_jax.runs.base import base_of_run, base_tokenizer, load_model
from cft_jax.sharding.mesh import make_mesh
from cft_jax.train.loop import base_identity, check_same
from cft_jax.train.optimizer import adamw
from cft_jax.train.state import abstract_state, split_model


def load_trained(workdir: Workdir, config: Config) -> tuple[Transformer, PreTrainedTokenizerBase, int]:
    """The model of a run with the weights of its newest whole checkpoint, its tokenizer, and that checkpoint's step.

    Raises:
      UserError: the run has no checkpoint, or its base model is gone or another one.
    """
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir} has no checkpoints yet; train first with cft_jax.main")
    base = base_of_run(config, workdir)
    tokenizer = base_tokenizer(config.model, base)
    if config.model.lora.enabled:
        # The checkpoint holds the adapters; the one that training started from may be gone.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, adapter=""))
    model = load_model(config, base, make_mesh())
    end_at(model, tokenizer, config.data.terminator)
    parts, weights, frozen = split_model(model)

    optimizer = adamw(weight_decay=config.train.weight_decay, max_grad_norm=config.train.max_grad_norm)
    with Checkpoints(workdir.checkpoints, keep=config.checkpoint.keep, read_only=True) as checkpoints:
        same_base = functools.partial(check_same, base_identity(model, frozen))
        restored = checkpoints.restore(abstract_state(weights, optimizer), same_base)
    if restored is None:
        raise UserError(f"{workdir} has no complete checkpoint yet; train first with cft_jax.main")
    parts.update(model, restored.state.weights)
    return model, tokenizer, restored.step
