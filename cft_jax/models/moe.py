"""Mixture of experts as in gpt-oss (HF modeling_gpt_oss.py): every token reaches its experts, none is dropped."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cft_jax.models.config import Moe
from cft_jax.models.dropout import Noise
from cft_jax.models.layers import WeightInit, einsum, matmul_precision, spread
from cft_jax.sharding.rules import constrain


class ExpertLinear(nnx.Module):
    """One matrix (`shape` [E, in, out], the layer axis aside) and bias per expert; applied to rows sorted by expert."""

    def __init__(self, name: str, shape: tuple[int, int, int], axes: tuple[str, str, str], init: WeightInit) -> None:
        self.name = name
        self.kernel = init.normal(shape, axes, shape[1])
        self.bias = init.zeros(shape[::2], axes[::2])
        self.lora = init.adapter(name, shape, axes, slice(1, 2))

    def __call__(
        self, x: Float[Array, "M I"], expert: Int[Array, "M"], group_sizes: Int[Array, "E"], noise: Noise | None
    ) -> Float[Array, "M O"]:
        """Rows of `x`, sorted by `expert`, each times its expert's matrix; returns the dtype of `x`."""
        y = _ragged(x, self.kernel[...].astype(x.dtype), group_sizes) + self.bias[...].astype(x.dtype)[expert]
        if self.lora is None:
            return checkpoint_name(y, self.name)
        lora_in, scale = self.lora.input(x, None if noise is None else noise.of(self.name))
        low = _ragged(lora_in, self.lora.a[...].astype(lora_in.dtype), group_sizes)
        update = _ragged(low, self.lora.b[...].astype(lora_in.dtype), group_sizes)
        y = (y.astype(jnp.float32) + scale * update.astype(jnp.float32)).astype(x.dtype)
        return checkpoint_name(y, self.name)


def _ragged(x: Array, w: Array, group_sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, w, group_sizes, precision=matmul_precision(x.dtype))


class MoeMlp(nnx.Module):
    """Router, the chosen experts' clamped swiglu, and their weighted sum; gate and up are interleaved as in HF."""

    def __init__(self, moe: Moe, embed_dim: int, init: WeightInit) -> None:
        D, E, F = embed_dim, moe.num_experts, moe.hidden_dim
        self.router_kernel = init.normal((D, E), ("embed", "experts"), D)
        self.router_bias = init.zeros((E,), ("experts",))
        self.gate_up_proj = ExpertLinear("gate_up_proj", (E, D, 2 * F), ("experts", "embed", "mlp"), init)
        self.down_proj = ExpertLinear("down_proj", (E, F, D), ("experts", "mlp", "embed"), init)
        self.moe = moe

    def __call__(self, x: Float[Array, "B T D"], *, noise: Noise | None, mesh: Mesh | None) -> Float[Array, "B T D"]:
        """Applies one layer's slice; routing is float32, with softmax over the chosen experts only."""
        B, T, D = x.shape
        E, top = self.moe.num_experts, self.moe.num_experts_per_token
        logits = einsum("BTD,DE->BTE", x.astype(jnp.float32), self.router_kernel[...].astype(jnp.float32))
        best, chosen = jax.lax.top_k(logits + spread(self.router_bias[...].astype(jnp.float32), 3), top)
        share = jax.nn.softmax(best, axis=-1).reshape(-1)
        expert = chosen.reshape(-1)
        order = jnp.argsort(expert)
        token = order // top
        expert = expert[order]
        group_sizes = jnp.bincount(expert, length=E)
        rows = x.reshape(B * T, D)[token]
        if noise is not None:
            noise = noise._replace(token=noise.token.reshape(-1)[token] * top + order % top)
        gate_up = self.gate_up_proj(rows, expert, group_sizes, noise)
        out = self.down_proj(self._swiglu(gate_up), expert, group_sizes, noise)
        weighted = out.astype(jnp.float32) * share[order][:, None]
        summed = jnp.zeros((B * T, D), jnp.float32).at[token].add(weighted)
        return constrain(summed.reshape(B, T, D).astype(x.dtype), ("batch", "length", "act_embed"), mesh)

    def _swiglu(self, gate_up: Float[Array, "M F2"]) -> Float[Array, "M F"]:
        gate = jnp.minimum(gate_up[:, 0::2], self.moe.swiglu_limit)
        up = jnp.clip(gate_up[:, 1::2], -self.moe.swiglu_limit, self.moe.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * self.moe.swiglu_alpha)
