"""Checkpoints: every bit back, on any mesh; damage found and passed over; nothing half-written is ever read."""

import gc
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cft_jax.checkpoints.fingerprint import fingerprint, settings_digest
from cft_jax.checkpoints.orbax_io import Checkpoints
from cft_jax.common.errors import UserError
from cft_jax.models.config import LoraSpec
from cft_jax.sharding.mesh import make_mesh

# orbax closes its event loop while other reads of a damaged checkpoint are still under way, and these then complain.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def complaints_come_at_once():
    """Collects what a test leaves behind while its filters hold, not during the next test."""
    yield
    gc.collect()


def accept(metadata):
    assert "config" in metadata


def make_state(seed=0, mesh=None):
    """Every dtype that a train state may hold, NaN payloads and negative zero included."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (16, 24), dtype=np.uint32)
    state = {
        "weights": {"stacks/0/a": bits.view(np.float32), "bf16": jnp.asarray(rng.normal(size=(8, 3)), jnp.bfloat16)},
        "count": np.int32(seed),
        "zero": np.array([-0.0, 0.0], np.float32),
    }
    mesh = mesh or make_mesh(8, 1, 1)
    specs = {"weights": {"stacks/0/a": PartitionSpec("data", "tensor"), "bf16": PartitionSpec("fsdp")}}
    specs |= {"count": PartitionSpec(), "zero": PartitionSpec()}
    return jax.tree.map(
        lambda x, spec: jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec)),
        state,
        specs,
    )


def raw(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def save(directory, *steps, keep=3):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"config": "abc"})


def restore(directory, target=None):
    with Checkpoints(directory, keep=3) as checkpoints:
        return checkpoints.restore(make_state() if target is None else target, accept)


def test_every_bit_comes_back_on_any_mesh(tmp_path):
    save(tmp_path, 5)
    for shape in [(8, 1, 1), (2, 2, 2), (1, 8, 1)]:
        target = make_state(mesh=make_mesh(*shape))
        restored = restore(tmp_path, target)
        assert restored.step == 5
        assert restored.metadata["config"] == "abc"
        assert raw(restored.state) == raw(make_state(5))
        assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, target)


def test_nothing_saved(tmp_path):
    assert restore(tmp_path / "none") is None


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    assert restore(tmp_path).step == 1
    # orbax removes them in the background and waits for that before it saves.
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert restore(tmp_path).step == 2


def test_state_may_be_overwritten_while_the_save_runs(tmp_path):
    state = make_state(3)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + x.dtype.type(1), tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state, {"config": "abc"})
        bump(state)
    assert raw(restore(tmp_path).state) == raw(make_state(3))


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def spoil(path: Path, how: str):
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["delete", "cut", pytest.param("flip", marks=pytest.mark.slow)])
def test_any_damage_to_any_file_is_found_or_harmless(tmp_path, how):
    """Each file of the newest checkpoint in turn: the state comes back whole, from it or from the one before."""
    save(tmp_path / "whole", 1, 2)
    fallen_back = []
    for name in files(tmp_path / "whole" / "2"):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", copy)
        spoil(copy / "2" / name, how)
        restored = restore(copy)
        assert raw(restored.state) == raw(make_state(restored.step)), name
        if restored.step == 1:
            fallen_back.append(name)
            assert (copy / "2.damaged").is_dir() and not (copy / "2").exists()
    assert any("/d/" in name for name in fallen_back)
    assert "meta/metadata" in fallen_back


def test_falling_back_says_so_and_the_step_can_be_saved_again(tmp_path, caplog):
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / "state")
    with Checkpoints(tmp_path, keep=3) as checkpoints, caplog.at_level("WARNING", logger="absl"):
        assert checkpoints.restore(make_state(), accept).step == 1
        checkpoints.save(2, make_state(2), {"config": "abc"})
    assert f"{tmp_path / '2'} is damaged" in caplog.text
    assert restore(tmp_path).step == 2


def test_all_damaged_is_an_error(tmp_path):
    save(tmp_path, 1, 2)
    for step in "12":
        (tmp_path / step / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        restore(tmp_path)


def test_a_checkpoint_of_another_run_is_refused_not_set_aside(tmp_path):
    save(tmp_path, 1)

    def refuse(metadata):
        raise UserError("another run")

    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(UserError, match="another run"):
        checkpoints.restore(make_state(), refuse)
    assert restore(tmp_path).step == 1


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=3) as checkpoints:

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

        with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left for a checkpoint"):
            patch.setattr(checkpoints._manager, "save", full)
            checkpoints.save(1, make_state(), {"config": "abc"})


def test_fingerprint_sees_bits_places_and_names_but_no_mesh():
    state = make_state(1)
    first = fingerprint(state)
    assert fingerprint(make_state(1, make_mesh(2, 2, 2))) == first
    assert fingerprint(make_state(2)) != first
    assert fingerprint(jax.tree.map(jnp.copy, state)) == first
    for change in (
        {**state, "zero": state["zero"][::-1]},  # -0.0 and 0.0 swapped
        {**state, "zero": state["zero"].reshape(1, 2)},
        {**state, "zero": state["zero"].astype(jnp.bfloat16)},
        {"renamed" if name == "zero" else name: leaf for name, leaf in state.items()},
    ):
        assert fingerprint(change) != first


def test_fingerprint_sees_settings_whose_last_bit_may_differ():
    state, spec = make_state(1), LoraSpec(rank=16, alpha=32.0, dropout=0.0, targets=("q_proj",))
    first = fingerprint(state, spec, 0.125)
    assert first == fingerprint(state, replace(spec, alpha=math.nextafter(32.0, 33.0)), math.nextafter(0.125, 1))
    changes = ({"alpha": 2000.0}, {"rank": 8}, {"targets": ("k_proj",)})
    others = [fingerprint(state, replace(spec, **change), 0.125) for change in changes]
    assert len({first, fingerprint(state), fingerprint(state, spec, 0.1250001), *others}) == 6
    # No width that models have gives a power whose last bit decides the digits.
    for width in range(8, 20_000, 8):
        powers = [(math.nextafter(power, 0), math.nextafter(power, 1e9)) for power in (width**0.5, width**-0.5)]
        assert all(settings_digest(low) == settings_digest(high) for low, high in powers)


def test_fingerprint_is_pinned():
    """It is compared across versions of the code; recorded once, jax 0.10.2."""
    tree = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.ones((2,), jnp.bfloat16)}
    assert fingerprint(tree) == "dca516cc0a7f2f376126c40f6e753383"
