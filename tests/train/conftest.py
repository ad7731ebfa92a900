"""A tiny model and tiny batches for the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cft_jax.data.batch import TargetBatch
from cft_jax.models.config import GatedMlp, LayerSpec, LoraSpec, ModelConfig, Rope
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.batch_loss import DeviceBatch
from cft_jax.sharding.rules import sharding

VOCAB = 64


def tiny_model(*, lora=True, mesh=None, dtype=jnp.float32, dropout=0.0, seed=0) -> Transformer:
    """Three layers of width 32; adapters start non-zero on both sides, so that every gradient is."""
    config = ModelConfig(
        num_layers=3,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        vocab_size=VOCAB,
        layer_pattern=(LayerSpec(window=None, rope=Rope(theta=1e4)),),
        mlp=GatedMlp(hidden_dim=40, activation="silu"),
        norm_eps=1e-5,
        attn_scale=6**-0.5,
        tie_head=True,
    )
    spec = LoraSpec(rank=4, alpha=8.0, dropout=dropout, targets=("q_proj", "v_proj", "down_proj")) if lora else None
    model = Transformer(
        config, lora=spec, dtype=dtype, param_dtype=dtype, mesh=mesh, rngs=nnx.Rngs(params=seed, lora=seed + 1)
    )
    rng = np.random.default_rng(seed)
    placed = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable[...]
        if path[-2:] == ("lora", "b"):
            value = jnp.asarray(rng.normal(size=value.shape) * 0.1, value.dtype)
        if mesh is not None:
            value = jax.device_put(value, sharding(value.shape, variable.get_metadata("axes"), mesh))
        placed.append((path, variable.replace(value)))
    nnx.update(model, nnx.from_flat_state(placed))
    return model


def tiny_batch(seed: int, *, rows: int = 8, kind: str = "soft", steps: int = 3) -> TargetBatch:
    """Rows of 5 to 9 tokens in 10 places, 1 to 3 steps, 1 to 3 targets per step; vocabulary 64."""
    rng = np.random.default_rng([seed, rows])
    length, fan_out = 10, 3 if kind == "soft" else 1
    lengths = rng.integers(5, length, rows)
    num_steps = rng.integers(1, steps + 1, rows)
    places = np.arange(length)
    real = places < lengths[:, None]
    step_real = np.arange(steps) < num_steps[:, None]
    ids = np.stack([[rng.choice(VOCAB, fan_out, replace=False) for _ in range(steps)] for _ in range(rows)])
    probs = rng.random((rows, steps, fan_out)) + 0.05
    probs = np.where(step_real[..., None], probs / probs.sum(-1, keepdims=True), 0)
    return TargetBatch(
        tokens=np.where(real, rng.integers(0, VOCAB, (rows, length)), 0).astype(np.int32),
        positions=np.where(real, places, 0).astype(np.int32),
        until=np.where(real, lengths[:, None], 0).astype(np.int32),
        step_index=np.where(step_real, lengths[:, None] - num_steps[:, None] + np.arange(steps), 0).astype(np.int32),
        step_weight=(step_real / (num_steps[:, None] if kind == "soft" else 1)).astype(np.float32),
        target_step=np.repeat(np.arange(steps, dtype=np.int32), fan_out)[None].repeat(rows, 0),
        target_ids=ids.reshape(rows, -1).astype(np.int32),
        target_probs=probs.reshape(rows, -1).astype(np.float32),
        row_weight=(np.ones(rows) if kind == "soft" else num_steps).astype(np.float32),
    )


def on_devices(batch: TargetBatch, mesh=None) -> DeviceBatch:
    """The batch as arrays, cut over the mesh's batch axes."""
    arrays = [jnp.asarray(x) for x in batch]
    if mesh is not None:
        arrays = [jax.device_put(x, sharding(x.shape, ("batch", *[None] * (x.ndim - 1)), mesh)) for x in arrays]
    return DeviceBatch(*arrays)


@pytest.fixture(scope="session")
def make_model():
    """`tiny_model`."""
    return tiny_model


@pytest.fixture(scope="session")
def make_batch():
    """`tiny_batch`."""
    return tiny_batch


@pytest.fixture(scope="session")
def put():
    """`on_devices`."""
    return on_devices
