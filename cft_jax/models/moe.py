"""Mixture of experts as in gpt-oss (HF modeling_gpt_oss.py): every token reaches its experts, none is dropped."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from cft_jax.models.config import Moe
from cft_jax.models.dropout import Noise
from cft_jax.models.grouped_product import grouped_product
from cft_jax.models.layers import WeightInit, einsum, spread
from cft_jax.sharding.mesh import platform
from cft_jax.sharding.rules import RULES, constrain, num_shards, partition_spec


class ExpertLinear(nnx.Module):
    """P matrices and biases per expert, applied to rows sorted by expert.

    Args:
      name: HF's name of the layer, which `LoraSpec.targets` refers to; there the outputs of the P are interleaved.
      shape: of the kernel, P, E, in, out, the layer axis aside; the adapter's B is [E, R, P, out].
      axes: logical axes of these.
      init: how the weights start.
    """

    def __init__(
        self, name: str, shape: tuple[int, int, int, int], axes: tuple[str, str, str, str], init: WeightInit
    ) -> None:
        self.name = name
        P, E, of_inputs, of_outputs = shape
        parts, experts, inputs, outputs = axes
        self.kernel = init.normal(shape, axes, of_inputs)
        self.bias = init.zeros((E, P, of_outputs), (experts, parts, outputs))
        # One A for all of an expert's matrices.
        self.lora = init.adapter(name, (E, of_inputs, P, of_outputs), (experts, inputs, parts, outputs), slice(1, 2))

    def __call__(
        self,
        x: Float[Array, "M I"],
        expert: Int[Array, "M"],
        group_sizes: Int[Array, "E"],
        noise: Noise | None,
        *,
        tpu: bool,
    ) -> list[Float[Array, "M O"]]:
        """Rows of `x`, sorted by `expert`, times each of their expert's matrices; returns the dtype of `x`."""
        product = partial(grouped_product, group_sizes=group_sizes, tpu=tpu)
        low, scale = None, 1.0
        if self.lora is not None:
            lora_in, scale = self.lora.input(x, None if noise is None else noise.of(self.name))
            low = product(lora_in, self.lora.a[...].astype(lora_in.dtype))
        ys = []
        for p in range(self.kernel.shape[0]):
            y = product(x, self.kernel[p].astype(x.dtype)) + self.bias[:, p].astype(x.dtype)[expert]
            if self.lora is not None and low is not None:
                update = product(low, self.lora.b[:, :, p].astype(low.dtype))
                y = (y.astype(jnp.float32) + scale * update.astype(jnp.float32)).astype(x.dtype)
            ys.append(checkpoint_name(y, self.name))
        return ys


class MoeMlp(nnx.Module):
    """Router, the chosen experts' clamped swiglu, and their weighted sum."""

    def __init__(self, moe: Moe, embed_dim: int, init: WeightInit) -> None:
        D, E, F = embed_dim, moe.num_experts, moe.hidden_dim
        self.router_kernel = init.normal((D, E), ("embed", "experts"), D)
        self.router_bias = init.zeros((E,), ("experts",))
        # Interleaved in one matrix as in the file, gate and up would take TPUs a walk through single columns.
        self.gate_up_proj = ExpertLinear("gate_up_proj", (2, E, D, F), ("parts", "experts", "embed", "mlp"), init)
        self.down_proj = ExpertLinear("down_proj", (1, E, F, D), ("parts", "experts", "mlp", "embed"), init)
        self.moe = moe

    def __call__(self, x: Float[Array, "B T D"], *, noise: Noise | None, mesh: Mesh | None) -> Float[Array, "B T D"]:
        """Applies one layer's slice; routing is float32, with softmax over the chosen experts only."""
        graphdef, state = nnx.split(self)

        def run(state, x, noise, *, tpu=False):
            return nnx.merge(graphdef, state)._on_one_device(x, noise, tpu=tpu)

        on_tpu = platform(mesh) == "tpu"
        if mesh is None or mesh.size == 1:
            return run(state, x, noise, tpu=on_tpu)
        if batch := partition_spec(x.shape, ("batch", None, None), mesh)[0]:
            # Each device routes and sorts its own tokens, so that none travels; weights are gathered as others are.
            rows = PartitionSpec(batch)
            of_noise = None if noise is None else Noise._make((PartitionSpec(), rows))
            # The TPU's kernel cannot be cut by XLA along `tensor`.
            whole = num_shards("mlp", mesh) == 1
            run = jax.shard_map(
                partial(run, tpu=on_tpu and whole),
                mesh=mesh,
                in_specs=(PartitionSpec(), rows, of_noise),
                out_specs=rows,
                axis_names=frozenset(mesh.axis_names if whole else RULES["batch"]),
                check_vma=False,
            )
        return constrain(run(state, x, noise), ("batch", "length", "act_embed"), mesh)

    def _on_one_device(self, x: Float[Array, "B T D"], noise: Noise | None, *, tpu: bool) -> Float[Array, "B T D"]:
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
        gate, up = self.gate_up_proj(rows, expert, group_sizes, noise, tpu=tpu)
        (out,) = self.down_proj(self._swiglu(gate, up), expert, group_sizes, noise, tpu=tpu)
        weighted = out.astype(jnp.float32) * share[order][:, None]
        summed = jnp.zeros((B * T, D), jnp.float32).at[token].add(weighted)
        return summed.reshape(B, T, D).astype(x.dtype)

    def _swiglu(self, gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
        gate = jnp.minimum(gate, self.moe.swiglu_limit)
        up = jnp.clip(up, -self.moe.swiglu_limit, self.moe.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * self.moe.swiglu_alpha)
