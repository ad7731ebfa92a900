"""What a run asks its devices' compiler before it loads any weight."""

import pytest

from cft_jax.common.errors import UserError
from cft_jax.data.objectives import training_dataset
from cft_jax.distributions import configured_tasks
from cft_jax.distributions.splits import TRAIN
from cft_jax.models.abstract import abstract_model
from cft_jax.plan.programs import train_program, work_of, work_of_data
from cft_jax.plan.start import check_step
from cft_jax.plan.topologies import compiler_devices, topology
from cft_jax.runs.base import load_model, model_options, run_tokenizer
from cft_jax.runs.scratch import make_base
from cft_jax.sharding.mesh import make_mesh
from cft_jax.train.loop import step_options
from cft_jax.train.prefetch import put_batch
from cft_jax.train.state import initial_state, split_model, state_shardings
from cft_jax.train.step import make_train_step


@pytest.fixture
def config(configured, tmp_path):
    return configured("tests/configs/tiny.py", f"data.cache_dir={tmp_path / 'data'}", "model.dtype=bfloat16")


# Slow tests are run without the checks of types, to which the shapes that stand for weights are no arrays.
@pytest.mark.slow
def test_what_is_asked_is_what_training_runs(config, tmp_path):
    """To the letter, or JAX's cache would not have it when training begins; made here of real weights, as it does."""
    mesh, tasks = make_mesh(2, 2, 2), configured_tasks(config.data)
    make_base(tmp_path / "base", config, [task for split in tasks.values() for task in split])
    model = load_model(config, str(tmp_path / "base"), mesh)
    tokenizer = run_tokenizer(config, tasks)
    dataset = training_dataset(config, tokenizer, tasks[TRAIN], row_multiple=4, share_prefix=True)
    work, batch = work_of_data(config, model.config, dataset), put_batch(dataset.batch(0), mesh)
    parts, weights, frozen = split_model(model)
    options = step_options(
        model,
        config.train,
        target=config.data.target,
        seed=config.seed,
        shared_prefix=work.shared_prefix,
        total_steps=work.total_steps,
    )
    step = make_train_step(parts, options, state_shardings(weights, options.optimizer))
    runs = step.lower(initial_state(weights, options.optimizer), frozen, batch, None)
    shape = (*batch.tokens.shape, batch.target_index.shape[1], batch.target_ids.shape[1])
    asked = train_program(work, config, abstract_model(model.config, **model_options(config.model, mesh)), shape)
    assert asked.lower().as_text() == runs.as_text()


@pytest.mark.slow
def test_what_it_takes_is_said(config, caplog):
    said = check_step(work_of(config), config, make_mesh(), available=2**30)
    assert said.startswith("by the compiler, the train step takes 0.0") and not caplog.messages
    # A GPU's compiler would not refuse it, so it may be tried.
    check_step(work_of(config), config, make_mesh(), available=1000)
    assert "the train step needs 0.0" in caplog.messages[-1] and "cft_jax.plan finds" in caplog.messages[-1]


@pytest.mark.tpu
def test_what_does_not_fit_a_tpu_is_refused(configured, tmp_path):
    # By hand: 2^15 rows of 24 tokens keep more than 16 GiB in two layers of width 256 and 4,096 columns.
    wide = ("model.scratch.embed_dim=256", "model.scratch.hidden_dim=8192", "train.batch_size=32768")
    config = configured("tests/configs/tiny.py", f"data.cache_dir={tmp_path / 'data'}", *wide)
    mesh = make_mesh(devices=compiler_devices(topology("v5e-1")))
    with pytest.raises(UserError, match=r"the train step needs [\d.]+ GiB, more than each device has; python -m"):
        check_step(work_of(config), config, mesh, available=None)
