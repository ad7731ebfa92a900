"""A tiny model and tiny batches for the tests of training."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cft_jax.common.storage import Workdir
from cft_jax.config import CheckpointConfig, KeepConfig, LogConfig, TrainConfig
from cft_jax.data.batch import TargetBatch
from cft_jax.data.kept import KeptTexts, kept_texts
from cft_jax.models.config import GatedMlp, LayerSpec, LoraSpec, ModelConfig, Rope
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.batch_loss import DeviceBatch, head_options
from cft_jax.sharding.mesh import make_mesh
from cft_jax.sharding.rules import sharding
from cft_jax.train.keep import keep_options
from cft_jax.train.loop import train
from cft_jax.train.optimizer import adamw, warmup_cosine
from cft_jax.train.prefetch import put_kept
from cft_jax.train.state import initial_state, split_model, state_shardings
from cft_jax.train.step import StepOptions, make_train_step

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
    model = nnx.eval_shape(
        lambda: Transformer(config, lora=spec, dtype=dtype, param_dtype=dtype, mesh=mesh, rngs=nnx.Rngs(0))
    )
    # Drawn with NumPy: JAX would compile a kernel for every shape.
    rng = np.random.default_rng(seed)
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "scale":
            value = np.ones(variable.shape)
        else:
            value = rng.normal(size=variable.shape) * (0.1 if path[-1] == "b" else config.embed_dim**-0.5)
        where = None if mesh is None else sharding(variable.shape, variable.get_metadata("axes"), mesh)
        filled.append((path, variable.replace(jax.device_put(value.astype(variable.dtype), where))))
    nnx.update(model, nnx.from_flat_state(filled))
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
        subtree_end=np.where(real, lengths[:, None], 0).astype(np.int32),
        target_index=np.where(step_real, lengths[:, None] - num_steps[:, None] + np.arange(steps), 0).astype(np.int32),
        target_weight=(step_real / (num_steps[:, None] if kind == "soft" else 1)).astype(np.float32),
        target_position=np.repeat(np.arange(steps, dtype=np.int32), fan_out)[None].repeat(rows, 0),
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


@functools.cache
def compiled(model_options, mesh_shape, kind, shared_prefix, micro_batches, seed, rate, keep):
    """Model, parts, start and step, shared by the tests that need the same."""
    mesh = make_mesh(*mesh_shape, devices=jax.devices()[: math.prod(mesh_shape)])
    model = tiny_model(mesh=mesh, **dict(model_options))
    optimizer = adamw(weight_decay=0.01, max_grad_norm=0.0)
    if rate is None:
        schedule = functools.partial(warmup_cosine, peak=1e-2, warmup_ratio=0.0, total_steps=100)
    else:
        schedule = lambda step: jnp.float32(rate)  # noqa: E731
    parts, weights, frozen = split_model(model)
    loss = head_options(kind, tau=1.0, softcap=None, mesh=mesh)
    kept = None if keep is None else keep_options(model, keep)
    options = StepOptions(loss, shared_prefix, micro_batches, seed, optimizer, schedule, kept)
    step = make_train_step(parts, options, state_shardings(weights, optimizer))
    return model, parts, optimizer, weights, frozen, step


class Trainer:
    """A fresh state of a tiny model, and its step."""

    def __init__(
        self,
        *,
        mesh=(1, 1, 1),
        kind="soft",
        shared_prefix=(),
        micro_batches=1,
        seed=11,
        rate=None,
        keep=None,
        **model_options,
    ):
        self.model, self.parts, optimizer, weights, self.frozen, self.step = compiled(
            tuple(sorted(model_options.items())), mesh, kind, shared_prefix, micro_batches, seed, rate, keep
        )
        self.mesh = self.model.mesh
        self.state = initial_state(jax.tree.map(jnp.copy, weights), optimizer)

    def run(self, batch, kept=None):
        rows = None if kept is None else put_kept(kept, self.mesh)
        self.state, metrics = self.step(self.state, self.frozen, on_devices(batch, self.mesh), rows)
        return jax.device_get(metrics)

    @property
    def weights(self):
        return jax.device_get(self.state.weights)


class TinyBatches:
    """Five batches an epoch of eight rows; the batch of a step depends on the step alone."""

    def __init__(self, change=lambda step, batch: batch, shared_prefix=()):
        self.shared_prefix = np.array(shared_prefix, np.int32)
        self.steps_per_epoch, self.num_examples = 5, 40
        self._change = change

    def batch(self, step):
        batch = tiny_batch(step)
        return self._change(step, batch._replace(positions=batch.positions + self.shared_prefix.size))

    def task_names(self, step):
        return [f"task-{step}-{row}" for row in range(10)]


def tiny_texts(row_multiple=1, per_step=3) -> KeptTexts:
    """Fourteen texts of 2 to 9 tokens in rows of 12."""
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, VOCAB, size).tolist() for size in rng.integers(2, 10, 14)]
    return kept_texts(texts, length=12, per_step=per_step, row_multiple=row_multiple, seed=3)


def run_training(
    workdir,
    dataset=None,
    *,
    mesh=(1, 1, 1),
    seed=11,
    identity=None,
    model_seed=0,
    lora=True,
    kept=None,
    keep_weight=0.0,
    **fields,
):
    """Trains a fresh tiny model with adapters for three epochs of five steps; returns result and weights.

    `fields` go to the records that have them: TrainConfig, CheckpointConfig, LogConfig.
    """
    records = []
    settings = {"learning_rate": 1e-2, "epochs": 3, "every_steps": 4, "warmup_ratio": 0.1} | fields
    for record in (TrainConfig, CheckpointConfig):
        names = {field.name for field in dataclasses.fields(record)}
        records.append(record(**{name: value for name, value in settings.items() if name in names}))
    mesh = make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
    model = tiny_model(mesh=mesh, dropout=0.1, seed=model_seed, lora=lora)
    result = train(
        model,
        dataset or TinyBatches(),
        target="soft",
        seed=seed,
        train=dataclasses.replace(records[0], keep=KeepConfig(weight=keep_weight)),
        checkpoint=records[1],
        log=LogConfig(every_steps=3, profile=settings.get("profile", "")),
        workdir=workdir if isinstance(workdir, Workdir) else Workdir(workdir),
        identity=identity or {"config": "abc"},
        kept=kept,
    )
    return result, jax.device_get(split_model(model)[1])


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(program_cache):
    """The same few programs are compiled for many runs: keep them."""


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


@pytest.fixture(scope="session")
def new_trainer():
    """`Trainer`."""
    return Trainer


@pytest.fixture(scope="session")
def tiny_batches():
    """`TinyBatches`."""
    return TinyBatches


@pytest.fixture(scope="session")
def make_texts():
    """`tiny_texts`."""
    return tiny_texts


@pytest.fixture(scope="session")
def run():
    """`run_training`."""
    return run_training
