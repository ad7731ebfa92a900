"""The mixture of experts against gpt-oss's module in transformers, and its adapters against merged matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from cft_jax.models.config import LoraSpec, Moe
from cft_jax.models.dropout import Noise
from cft_jax.models.layers import WeightInit
from cft_jax.models.moe import MoeMlp
from cft_jax.sharding.mesh import make_mesh

D, F, E = 12, 10, 5
MOE = Moe(hidden_dim=F, num_experts=E, num_experts_per_token=2, swiglu_limit=1.5, swiglu_alpha=1.1)


def random_module(*, lora=None):
    module = MoeMlp(MOE, D, WeightInit(1, lora, jnp.float32, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape[1:]), jnp.float32), state))


def interleaved(x):
    """[E, 2, ..., F] as the file has it: [E, ..., 2F]."""
    x = np.moveaxis(np.asarray(x), 1, -1)
    return x.reshape(*x.shape[:-2], -1)


def test_experts_equal_transformers():
    ours = random_module()
    config = GptOssConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=2,
        swiglu_alpha=1.1,
        swiglu_limit=1.5,
    )
    theirs = GptOssMLP(config)
    weights = {
        "router.weight": ours.router_kernel[...].T,
        "router.bias": ours.router_bias[...],
        "experts.gate_up_proj": interleaved(np.moveaxis(ours.gate_up_proj.kernel[...], 0, 1)),
        "experts.gate_up_proj_bias": interleaved(ours.gate_up_proj.bias[...]),
        "experts.down_proj": ours.down_proj.kernel[0],
        "experts.down_proj_bias": ours.down_proj.bias[:, 0],
    }
    theirs.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()})
    x = np.random.default_rng(1).normal(size=(3, 7, D)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x))[0].numpy()
    # Both clamps act on these inputs.
    inner = x.reshape(-1, D) @ np.asarray(ours.gate_up_proj.kernel[...])[0, 0]
    assert (np.abs(inner) > 1.5).mean() > 0.1
    np.testing.assert_allclose(ours(jnp.asarray(x), noise=None, mesh=None), expected, atol=1e-4, rtol=0)


def test_no_token_is_dropped_when_all_choose_one_expert():
    module = random_module()
    module.router_kernel.set_value(jnp.zeros((D, E)))
    module.router_bias.set_value(jnp.array([0.0, 9.0, 0.0, 8.0, 0.0]))
    x = np.random.default_rng(2).normal(size=(2, 50, D)).astype(np.float32)
    whole = module(jnp.asarray(x), noise=None, mesh=None)
    alone = np.stack([[module(jnp.asarray(t[None, None]), noise=None, mesh=None)[0, 0] for t in row[:3]] for row in x])
    np.testing.assert_allclose(whole[:, :3], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_an_experts_adapter_is_a_change_of_its_matrix(target):
    lora = LoraSpec(rank=2, alpha=3.0, dropout=0.0, targets=(target,))
    module, plain = random_module(lora=lora), random_module(lora=lora)
    adapted = getattr(module, target)
    merged = adapted.kernel[...] + 1.5 * jnp.einsum("EIR,ERPO->PEIO", adapted.lora.a[...], adapted.lora.b[...])
    getattr(plain, target).kernel.set_value(merged)
    getattr(plain, target).lora.b.set_value(jnp.zeros_like(adapted.lora.b[...]))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, D)), jnp.float32)
    np.testing.assert_allclose(module(x, noise=None, mesh=None), plain(x, noise=None, mesh=None), rtol=1e-4, atol=1e-4)


def test_no_token_leaves_its_device():
    """On a mesh: the same output and gradients, and nothing but weights and their gradients goes between devices."""
    module, mesh = (
        random_module(lora=LoraSpec(2, 4.0, 0.1, ("gate_up_proj", "down_proj"))),
        make_mesh(data=2, fsdp=2, tensor=2),
    )
    x = np.random.default_rng(4).normal(size=(8, 16, D)).astype(np.float32)
    noise = Noise(jax.random.key(0), jnp.arange(8 * 16).reshape(8, 16))
    graphdef, state = nnx.split(module)

    def loss(state, x, mesh):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x, noise=noise, mesh=mesh)))

    alone = jax.jit(jax.value_and_grad(loss), static_argnums=2)(state, x, None)
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    compiled = jax.jit(jax.value_and_grad(loss), static_argnums=2).lower(state, rows, mesh).compile()
    for ours, theirs in zip(*map(jax.tree.leaves, (compiled(state, rows), alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-4)
    moved = re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute)\(", compiled.as_text())
    assert not [shape for shape, _ in moved if f"{8 * 16}" in shape or "[8," in shape], moved
