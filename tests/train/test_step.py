"""One step: sums over microbatches and meshes, what is trained and what is not, updates that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.sharding.mesh import make_mesh
from cft_jax.train.optimizer import adamw
from cft_jax.train.state import initial_state, split_model


# Float32 in another order of summation, on any CPU, relative to the largest: a mean of means is off by percents.
def assert_same(got, want, tolerance=1e-4):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=tolerance * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.parametrize(("kind", "lora"), [("soft", True), ("hard", False)], ids=["soft lora", "hard full"])
def test_microbatches_equal_one_batch(new_trainer, make_batch, kind, lora):
    """Rows differ in length, steps and weight, so a mean of means would show. The first moments are the gradient."""
    batch = make_batch(1, kind=kind)
    whole, quarters = [new_trainer(lora=lora, kind=kind, micro_batches=n) for n in (1, 4)]
    results = [trainer.run(batch) for trainer in (whole, quarters)]
    np.testing.assert_allclose(results[1].loss, results[0].loss, rtol=1e-5)
    np.testing.assert_allclose(results[1].grad_norm, results[0].grad_norm, rtol=1e-4)
    first_moments = [jax.device_get(trainer.state.optimizer[0].mu) for trainer in (whole, quarters)]
    assert_same(first_moments[1], first_moments[0])


@pytest.mark.parametrize(
    ("lora", "shapes"),
    [
        pytest.param(True, [(8, 1, 1), (2, 2, 2)], id="lora"),
        pytest.param(False, [(2, 4, 1), (1, 2, 4)], id="full", marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same_losses(new_trainer, make_batch, lora, shapes):
    """Three steps with dropout, shared tokens and two microbatches; one device against eight, all state cut alike."""
    batches = [make_batch(seed, rows=16) for seed in range(3)]
    alone = new_trainer(lora=lora, dropout=0.3, micro_batches=2, shared_prefix=(7, 3, 60))
    want = [alone.run(batch) for batch in batches]
    for shape in shapes:
        spread = new_trainer(lora=lora, dropout=0.3, mesh=shape, micro_batches=2, shared_prefix=(7, 3, 60))
        before = jax.tree.map(lambda x: x.sharding, spread.state)
        got = [spread.run(batch) for batch in batches]
        np.testing.assert_allclose([m.loss for m in got], [m.loss for m in want], rtol=1e-5)
        np.testing.assert_allclose([m.grad_norm for m in got], [m.grad_norm for m in want], rtol=1e-4)
        assert jax.tree.map(lambda x: x.sharding, spread.state) == before


def test_state_is_cut_like_the_weights(make_model):
    weights = split_model(make_model(lora=False, mesh=make_mesh(2, 2, 2)))[1]
    state = initial_state(weights, adamw(weight_decay=0.01, max_grad_norm=0.0))
    embed = state.weights["embed"].sharding
    assert embed.shard_shape((64, 32)) == (32, 16)
    assert state.optimizer[0].nu["embed"].sharding == embed


def test_only_adapters_are_trained(new_trainer, make_batch):
    trainer = new_trainer(lora=True)
    model = trainer.model
    before = {name: np.asarray(leaf) for name, leaf in trainer.frozen.items()}
    start = {name: np.array(weight) for name, weight in trainer.state.weights.items()}
    assert len(start) == 6 and all("lora" in name for name in start)
    trainer.run(make_batch(0))
    trainer.parts.update(model, trainer.state.weights)
    for name, leaf in trainer.frozen.items():
        assert np.array_equal(leaf, before[name]), name
    for name, weight in trainer.weights.items():
        assert not np.array_equal(weight, start[name]), name
    assert np.array_equal(model.stacks[0][0].attn.q_proj.lora.b[...], trainer.weights["stacks/0/0/attn/q_proj/lora/b"])


def test_full_training_moves_every_weight(new_trainer, make_batch):
    trainer = new_trainer(lora=False)
    start = {name: np.array(weight) for name, weight in trainer.state.weights.items()}
    trainer.run(make_batch(0))
    unmoved = [name for name, weight in trainer.weights.items() if np.array_equal(weight, start[name])]
    assert not unmoved


def test_bfloat16_models_are_trained_in_float32(new_trainer, make_batch):
    """Updates far below a bfloat16's spacing add up: 40 steps of rate 1e-5 move weights of order 0.2 by 4e-4."""
    for lora in (True, False):
        trainer = new_trainer(lora=lora, dtype=jnp.bfloat16, rate=1e-5)
        model = trainer.model
        start = trainer.weights
        assert all(weight.dtype == np.float32 for weight in start.values())
        for _ in range(40):
            metrics = trainer.run(make_batch(0))
        assert metrics.loss.dtype == np.float32
        moved = np.abs(trainer.weights["stacks/0/0/mlp/down_proj/" + ("lora/a" if lora else "kernel")])
        moved = moved - np.abs(start["stacks/0/0/mlp/down_proj/" + ("lora/a" if lora else "kernel")])
        assert 2e-4 < np.abs(moved).max() < 5e-4
        trainer.parts.update(model, trainer.state.weights)
        assert model.stacks[0][0].mlp.down_proj.kernel[...].dtype == jnp.bfloat16


def test_an_update_that_is_not_finite_is_left_out(new_trainer, make_batch):
    trainer = new_trainer()
    trainer.run(make_batch(0))
    before = jax.device_get(trainer.state)
    batch = make_batch(1)
    spoiled = batch._replace(target_probs=np.full_like(batch.target_probs, np.inf))
    metrics = trainer.run(spoiled)
    after = jax.device_get(trainer.state)
    assert not metrics.finite and metrics.skipped == 1
    assert (after.step, after.skipped) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, (after.weights, after.optimizer), (before.weights, before.optimizer))
    assert trainer.run(batch).finite


def test_rows_of_padding_change_nothing(new_trainer, make_batch):
    batch = make_batch(0)
    padded = type(batch)(*(np.concatenate([x, np.zeros_like(x)]) for x in batch))
    plain, with_padding = [new_trainer() for _ in range(2)]
    first, second = plain.run(batch), with_padding.run(padded)
    np.testing.assert_allclose(second.loss, first.loss, rtol=1e-5)
    np.testing.assert_allclose(second.padding_fraction, (1 + first.padding_fraction) / 2, rtol=1e-6)
    assert_same(with_padding.weights, plain.weights)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_shared_beginning_changes_nothing(lora, new_trainer, make_batch):
    """Three tokens before every row, given once, against the same tokens in every row; two microbatches."""
    shared_prefix = (7, 3, 60)
    batch = make_batch(4)
    real = batch.subtree_end > 0
    wide = {name: np.pad(getattr(batch, name), ((0, 0), (3, 0))) for name in ("tokens", "positions", "subtree_end")}
    wide["tokens"][:, :3] = shared_prefix
    wide["positions"] = np.pad(np.where(real, batch.positions + 3, 0), ((0, 0), (3, 0)))
    wide["positions"][:, :3] = np.arange(3)
    wide["subtree_end"] = np.pad(np.where(real, batch.subtree_end + 3, 0), ((0, 0), (3, 0)))
    wide["subtree_end"][:, :3] = batch.subtree_end[:, :1] + 3
    target_index = np.where(batch.target_weight > 0, batch.target_index + 3, 0)
    apart, within = new_trainer(lora=lora, shared_prefix=shared_prefix, micro_batches=2), new_trainer(lora=lora)
    got = apart.run(batch._replace(positions=np.where(real, batch.positions + 3, 0)))
    want = within.run(batch._replace(**wide, target_index=target_index.astype(np.int32)))
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert_same(*(jax.device_get(trainer.state.optimizer[0].mu) for trainer in (apart, within)))


def test_dropout_depends_on_seed_and_step_alone(new_trainer, make_batch):
    batch = make_batch(0)

    def losses(seed, steps, dropout=0.5):
        trainer = new_trainer(dropout=dropout, seed=seed, rate=0.0)
        return [float(trainer.run(batch).loss) for _ in range(steps)]

    first = losses(11, 3)
    assert losses(11, 3) == first
    assert len(set(first)) == 3
    assert losses(12, 1)[0] != first[0]
    assert len(set(losses(11, 2, dropout=0.0))) == 1


def test_the_step_compiles_once_and_reuses_its_buffers(new_trainer, make_batch):
    trainer = new_trainer()
    before = trainer.step._cache_size()
    old = trainer.state.weights["stacks/0/0/attn/q_proj/lora/a"]
    for seed in range(3):
        trainer.run(make_batch(seed))
    assert trainer.step._cache_size() <= max(before, 1)
    assert old.is_deleted()


def test_bfloat16_learns_as_float32(new_trainer, make_batch):
    """Adapters are multiplied in the model's dtype: fifty steps, and the first update, stay close to float32's."""
    batches = [make_batch(seed) for seed in range(5)]
    exact, rounded = (new_trainer(dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    losses = [[trainer.run(batches[step % 5]) for step in range(50)] for trainer in (exact, rounded)]
    assert losses[1][0].grad_norm == pytest.approx(losses[0][0].grad_norm, rel=0.03)
    mean = [np.mean([metrics.loss for metrics in run[-5:]]) for run in losses]
    assert mean[1] == pytest.approx(mean[0], rel=0.01)
    assert mean[0] < 0.6 * losses[0][0].loss


@pytest.mark.parametrize("prefix", [(7, 3, 60), tuple(range(12))], ids=["beside", "before"])
def test_shared_tokens_count_as_if_each_row_had_them(new_trainer, make_batch, prefix):
    """Shorter than the rows they go through the model as one of them, longer ones by themselves; same gradient."""
    batch = make_batch(1)
    trainer = new_trainer(shared_prefix=prefix, rate=0.0)
    got = trainer.run(batch._replace(positions=batch.positions + len(prefix)))
    wide = {name: np.pad(getattr(batch, name), ((0, 0), (len(prefix), 0))) for name in ("tokens", "positions")}
    wide["tokens"][:, : len(prefix)] = prefix
    wide["positions"] = np.arange(wide["tokens"].shape[1], dtype=np.int32)[None].repeat(len(batch.tokens), 0)
    ends = np.where(batch.subtree_end > 0, batch.subtree_end + len(prefix), 0)
    wide["subtree_end"] = np.pad(ends, ((0, 0), (len(prefix), 0)), constant_values=wide["tokens"].shape[1])
    wide["target_index"] = batch.target_index + len(prefix)
    want = new_trainer(rate=0.0).run(batch._replace(**wide))
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=1e-4)
