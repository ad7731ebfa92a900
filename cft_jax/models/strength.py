"""The strength of a model's adapters, set without training them again."""

import dataclasses

from flax import nnx

from cft_jax.common.errors import UserError
from cft_jax.models.layers import Lora
from cft_jax.models.transformer import Transformer


def set_strength(model: Transformer, strength: float, *, name: str) -> None:
    """Multiplies the adapters' alpha, and with it what they add, by `strength`; `name` names the model in messages.

    Raises:
      UserError: the strength is not 1 and the model has no adapters.
    """
    if strength == 1:
        return
    if model.lora_spec is None:
        raise UserError(
            f"config.model.lora.strength={strength} is of a model's adapters, and {name} has none; leave it at 1.0"
        )
    set_alpha(model, model.lora_spec.alpha * strength)


def set_alpha(model: Transformer, alpha: float) -> None:
    """Gives all adapters of a model another alpha; 0 makes it its base."""
    assert model.lora_spec is not None
    model.lora_spec = dataclasses.replace(model.lora_spec, alpha=alpha)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Lora):
            module.spec = model.lora_spec
