"""The loop: the same weights whatever interrupts it, metrics once a step, errors that say what happened."""

import os
import signal

import jax
import numpy as np
import pytest
from etils import epath

from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.common.writer import read_metrics
from cft_jax.train import NonFiniteLossError
from cft_jax.train.loop import _clear_memory_errors, check_same

TIMES = {"examples_per_second", "step_seconds"}


def rows(workdir):
    """Rows without what the clock says."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run):
    """A run left alone: result, weights and workdir."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return *run(workdir), workdir


def assert_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].tobytes() == want[name].tobytes(), name


def test_a_run_left_alone(undisturbed):
    result, _, workdir = undisturbed
    assert (result.step, result.stop, result.preempted, result.skipped) == (15, 15, False, 0)
    assert saved(workdir) == [12, 15]  # every 4 steps and at the end, two kept
    found = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 3, 6, 9, 12, 15]
    assert [row["epoch"] for row in found] == [0.2, 0.6, 1.2, 1.8, 2.4, 3.0]
    assert set(found[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "padding_fraction", *TIMES}
    # Warm-up of int(0.1 * 15) = 1 step: the first update has rate 0, the second the whole.
    assert found[0]["learning_rate"] == 0
    np.testing.assert_allclose(found[1]["learning_rate"], 1e-2 * 0.5 * (1 + np.cos(np.pi * 1 / 14)), rtol=1e-5)
    for row in found:
        np.testing.assert_allclose(row["examples_per_second"] * row["step_seconds"], 8, rtol=1e-6)


def test_metrics_reach_the_store_before_the_checkpoint_they_belong_to(tmp_path, run, tiny_batches):
    """A workdir that mirrors another one; the run dies without a chance to copy anything more."""

    def die(step, batch):
        if step >= 8:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        run(Workdir(tmp_path / "here", epath.Path(tmp_path / "there")), tiny_batches(die))
    assert saved(tmp_path / "there") == [4, 8]
    assert [row["step"] for row in read_metrics(tmp_path / "there" / "metrics.jsonl")] == [1, 3, 6]
    assert not (tmp_path / "here" / "checkpoints").exists()


def test_going_on_is_bit_exact_and_measures_every_step_once(tmp_path, run, undisturbed):
    _, weights, workdir = undisturbed
    for stop in (5, 6, 11, 0):
        result, found = run(tmp_path, max_steps=stop)
    assert result.step == 15
    assert_bits(found, weights)
    # The last step of a shorter run is logged as well.
    assert [row for row in rows(tmp_path) if row["step"] not in (5, 11)] == rows(workdir)


def test_a_finished_run_does_nothing(tmp_path, run, tiny_batches):
    _, weights = run(tmp_path, max_steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def refuse(step, batch):
        raise AssertionError("no batch is needed")

    result, again = run(tmp_path, tiny_batches(refuse), max_steps=2)
    assert (result.step, result.preempted) == (2, False)
    assert_bits(again, weights)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_sigterm_saves_and_stops(tmp_path, run, tiny_batches, undisturbed):
    def terminate(step, batch):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    result, _ = run(tmp_path, tiny_batches(terminate))
    assert result.preempted and result.step < 15
    assert saved(tmp_path)[-1] == result.step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result, weights = run(tmp_path)
    assert (result.step, result.preempted) == (15, False)
    assert_bits(weights, undisturbed[1])
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(undisturbed[2])]


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_damaged_checkpoint_costs_only_its_steps(tmp_path, run, undisturbed):
    run(tmp_path, max_steps=9)
    assert saved(tmp_path) == [8, 9]
    (tmp_path / "checkpoints" / "9" / "meta" / "metadata").write_text("{}")
    _, weights = run(tmp_path)
    assert_bits(weights, undisturbed[1])
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == [1, 3, 6, 9, 12, 15]


def test_another_mesh_goes_on_with_the_same_losses(tmp_path, run, undisturbed):
    run(tmp_path, max_steps=6)
    _, weights = run(tmp_path, mesh=(2, 2, 2))
    want = {row["step"]: row["loss"] for row in rows(undisturbed[2])}
    for row in rows(tmp_path):
        np.testing.assert_allclose(row["loss"], want[row["step"]], rtol=1e-5)
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, undisturbed[1][name], atol=1e-3 * np.abs(weight).max(), err_msg=name)


def spoiled_at(*steps):
    """Targets of infinite probability at these steps, counted from 1."""

    def change(step, batch):
        if step + 1 in steps:
            batch = batch._replace(target_probs=np.full_like(batch.target_probs, np.inf))
        return batch

    return change


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, run, tiny_batches):
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, tiny_batches(spoiled_at(6)))
    message = str(caught.value)
    assert "at step 6" in message
    assert "task-5-0, task-5-1" in message and "and 2 more" in message
    assert "the last checkpoint is of step 4" in message
    # Found before the next checkpoint, so that none is written behind it.
    assert saved(tmp_path) == [4]


def test_skipping_counts(tmp_path, run, tiny_batches):
    result, weights = run(tmp_path, tiny_batches(spoiled_at(2, 6)), on_nonfinite="skip")
    assert (result.step, result.skipped) == (15, 2)
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 1, 2, 2, 2, 2]
    assert [row["loss"] is None for row in rows(tmp_path)] == [False, False, True, False, False, False]
    assert all(np.isfinite(weight).all() for weight in weights.values())


def test_checkpoints_of_another_run_are_refused(tmp_path, run):
    run(tmp_path, max_steps=2)
    with pytest.raises(UserError, match=r"of another run \(config was 'abc' and is 'xyz'\)"):
        run(tmp_path, identity={"config": "xyz"})
    with pytest.raises(UserError, match="other base weights"):
        run(tmp_path, model_seed=1)
    assert saved(tmp_path) == [2]
    # Checkpoints of earlier versions, which record less, go on.
    check_same({"architecture": "a"}, {"base_weights": "b"})
    with pytest.raises(UserError, match=r"another config\.json"):
        check_same({"architecture": "a"}, {"architecture": "b"})


def test_what_an_older_checkpoint_does_not_record_is_said(tmp_path, run, caplog):
    run(tmp_path, identity={"seed": 1}, max_steps=1)
    run(tmp_path, identity={"seed": 1, "tasks": "abc"}, max_steps=2)
    assert caplog.text.count("the checkpoint does not record its tasks; taken to be this run's") == 1


def test_an_error_of_the_data_comes_through(tmp_path, run, tiny_batches):
    def fail(step, batch):
        if step == 3:
            raise RuntimeError("the data broke")
        return batch

    with pytest.raises(RuntimeError, match="the data broke"):
        run(tmp_path, tiny_batches(fail))


def test_profile_window(tmp_path, run):
    run(tmp_path, max_steps=4, profile="2:3")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(UserError, match=r"config\.log\.profile='3-5' must be first:last"):
        run(tmp_path / "other", profile="3-5")


def test_out_of_memory_is_one_clear_line():
    with pytest.raises(UserError, match=r"raise config\.train\.grad_accum_steps"), _clear_memory_errors():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")
    with pytest.raises(jax.errors.JaxRuntimeError), _clear_memory_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_shared_beginning_passes_through_the_loop(tmp_path, run, tiny_batches):
    result, _ = run(tmp_path, tiny_batches(shared_prefix=(5, 9)), max_steps=2)
    assert result.step == 2
