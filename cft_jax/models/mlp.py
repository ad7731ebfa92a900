"""The gated feed-forward layer, dense."""

import functools

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cft_jax.models.config import GatedMlp
from cft_jax.models.dropout import Noise
from cft_jax.models.layers import Linear, WeightInit, low_rank
from cft_jax.sharding.rules import constrain

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Mlp(nnx.Module):
    """down(act(gate(x)) * up(x)); weights carry a leading layer axis."""

    def __init__(self, mlp: GatedMlp, embed_dim: int, init: WeightInit) -> None:
        D, F = embed_dim, mlp.hidden_dim
        self.gate_proj = Linear("gate_proj", "BTD,DF->BTF", (D, F), ("embed", "mlp"), init)
        self.up_proj = Linear("up_proj", "BTD,DF->BTF", (D, F), ("embed", "mlp"), init)
        self.down_proj = Linear("down_proj", "BTF,FD->BTD", (F, D), ("mlp", "embed"), init)
        self.activation = ACTIVATIONS[mlp.activation]

    def __call__(self, x: Float[Array, "B T D"], *, noise: Noise | None, mesh: Mesh | None) -> Float[Array, "B T D"]:
        """Applies one layer's slice."""
        gate_low, up_low = low_rank(x, noise, "mlp", self.gate_proj, self.up_proj)
        inner = self.activation(self.gate_proj(x, gate_low)) * self.up_proj(x, up_low)
        inner = constrain(inner, ("batch", "length", "mlp"), mesh)
        return self.down_proj(inner, *low_rank(inner, noise, "down_proj", self.down_proj))
