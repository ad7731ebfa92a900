"""Mixture of experts as in gpt-oss (HF modeling_gpt_oss.py): every token reaches its experts, none is dropped."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from cft_jax.models.config import Moe
from cft_jax.models.layers import WeightInit, einsum, fold_name, matmul_precision, spread
from cft_jax.sharding.rules import constrain


class ExpertLinear(nnx.Module):
    """One matrix (`shape` [E, in, out], the layer axis aside) and bias per expert; applied to rows sorted by expert."""

    def __init__(self, name: str, shape: tuple[int, int, int], axes: tuple[str, str, str], init: WeightInit) -> None:
        self.name = name
        self.kernel = init.normal(shape, axes, shape[1])
        self.bias = init.zeros(shape[::2], axes[::2])
        self.lora = init.adapter(name, shape, axes, slice(1, 2))

    def __call__(
        self, x: Float[Array, "M I"], expert: Int[Array, "M"], group_sizes: Int[Array, "E"], key: Key[Array, ""] | None
    ) -> Float[Array, "M O"]:
        """Rows of `x`, sorted by `expert`, each times its expert's matrix; returns the dtype of `x`."""
        y = _ragged(x, self.kernel[...].astype(x.dtype), group_sizes) + self.bias[...].astype(x.dtype)[expert]
        if self.lora is None:
            return y
        low = _ragged(self.lora.dropped(x, fold_name(key, self.name)), self.lora.a[...], group_sizes)
        update = _ragged(low, self.lora.b[...], group_sizes)
        return (y.astype(jnp.float32) + self.lora.spec.scale * update).astype(x.dtype)


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

    def __call__(
        self, x: Float[Array, "B T D"], *, key: Key[Array, ""] | None, mesh: Mesh | None
    ) -> Float[Array, "B T D"]:
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
        gate_up = self.gate_up_proj(rows, expert, group_sizes, key)
        out = self.down_proj(self._swiglu(gate_up), expert, group_sizes, key)
        weighted = out.astype(jnp.float32) * share[order][:, None]
        summed = jnp.zeros((B * T, D), jnp.float32).at[token].add(weighted)
        return constrain(summed.reshape(B, T, D).astype(x.dtype), ("batch", "length", "act_embed"), mesh)

    def _swiglu(self, gate_up: Float[Array, "M F2"]) -> Float[Array, "M F"]:
        gate = jnp.minimum(gate_up[:, 0::2], self.moe.swiglu_limit)
        up = jnp.clip(gate_up[:, 1::2], -self.moe.swiglu_limit, self.moe.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * self.moe.swiglu_alpha)
