"""Mixture of experts as in gpt-oss (HF modeling_gpt_oss.py): every token reaches its experts, none is dropped."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from cft_jax.models.config import LoraSpec, Moe
from cft_jax.models.layers import Lora, einsum, fold_name, matmul_precision, normal_param, spread
from cft_jax.sharding.rules import constrain


class ExpertLinear(nnx.Module):
    """One matrix and bias per expert, [L, E, in, out]; applied to rows sorted by expert."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        layers: int,
        experts: int,
        lora: LoraSpec | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        lead, lead_axes = (layers, experts), ("layers", "experts")
        self.name = name
        self.kernel = normal_param(rngs.params(), (*lead, *shape), (*lead_axes, *axes), shape[0], param_dtype)
        self.bias = nnx.Param(jnp.zeros((*lead, shape[1]), param_dtype), axes=(*lead_axes, axes[1]))
        self.lora = (
            Lora(lora, shape[:1], shape[1:], axes[:1], axes[1:], lead, lead_axes, rngs=rngs)
            if lora is not None and name in lora.targets
            else None
        )

    def __call__(
        self,
        x: Float[Array, "M I"],
        expert: Int[Array, "M"],
        group_sizes: Int[Array, "E"],
        key: Key[Array, ""] | None,
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

    def __init__(
        self, moe: Moe, embed_dim: int, layers: int, *, lora: LoraSpec | None, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        D, E, F = embed_dim, moe.num_experts, moe.hidden_dim
        self.router_kernel = normal_param(rngs.params(), (layers, D, E), ("layers", "embed", "experts"), D, param_dtype)
        self.router_bias = nnx.Param(jnp.zeros((layers, E), param_dtype), axes=("layers", "experts"))
        linear = functools.partial(
            ExpertLinear, layers=layers, experts=E, lora=lora, param_dtype=param_dtype, rngs=rngs
        )
        self.gate_up_proj = linear("gate_up_proj", (D, 2 * F), ("embed", "mlp"))
        self.down_proj = linear("down_proj", (F, D), ("mlp", "embed"))
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
