"""The gated feed-forward layer, dense."""

import functools

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cft_jax.models.config import GatedMlp, LoraSpec
from cft_jax.models.layers import Linear
from cft_jax.sharding.rules import constrain

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Mlp(nnx.Module):
    """down(act(gate(x)) * up(x)); weights carry a leading layer axis."""

    def __init__(
        self,
        mlp: GatedMlp,
        embed_dim: int,
        layers: int,
        *,
        lora: LoraSpec | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        D, F = embed_dim, mlp.hidden_dim
        linear = functools.partial(Linear, layers=layers, lora=lora, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = linear("gate_proj", "BTD,DF->BTF", (D, F), ("embed", "mlp"))
        self.up_proj = linear("up_proj", "BTD,DF->BTF", (D, F), ("embed", "mlp"))
        self.down_proj = linear("down_proj", "BTF,FD->BTD", (F, D), ("mlp", "embed"))
        self.activation = ACTIVATIONS[mlp.activation]

    def __call__(
        self, x: Float[Array, "B T D"], *, key: Key[Array, ""] | None, mesh: Mesh | None
    ) -> Float[Array, "B T D"]:
        """Applies one layer's slice."""
        inner = self.activation(self.gate_proj(x, key)) * self.up_proj(x, key)
        return self.down_proj(constrain(inner, ("batch", "length", "mlp"), mesh), key)
