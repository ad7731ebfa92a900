"""What the ledger makes of the steps' figures."""

import jax.numpy as jnp
import pytest

from cft_jax.common.progress import Progress
from cft_jax.common.writer import MetricsWriter, read_metrics
from cft_jax.models.flops import Operations
from cft_jax.train.ledger import Ledger
from cft_jax.train.step import StepMetrics


def metrics(*, tokens, steps):
    one = jnp.float32(1)
    return StepMetrics(one, one, one, jnp.bool_(True), jnp.int32(0), one, jnp.int32(tokens), jnp.int32(steps))


@pytest.mark.parametrize("peak", [None, 4e3])
def test_utilization_is_what_all_steps_since_the_last_row_computed(tmp_path, peak):
    path = tmp_path / "metrics.jsonl"
    with (
        Progress("train", total=5, unit="step") as progress,
        Ledger(
            MetricsWriter(path, after_step=0, enabled=True),
            progress,
            every=2,
            done=0,
            stop=5,
            steps_per_epoch=5,
            examples_per_step=1.0,
            operations=Operations(per_token=3, per_step=50),
            peak=peak,
            stop_on_nonfinite=True,
        ) as ledger,
    ):
        for step in range(1, 6):
            ledger.add(step, metrics(tokens=100 * step, steps=step))
        ledger.drain()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    if peak is None:
        assert all("model_flops_utilization" not in row for row in rows)
        return
    # Step s computes 3 * 100 s + 50 s = 350 s operations; the row of step 4 stands for steps 3 and 4.
    for row, computed, steps in zip(rows, (350, 700, 350 * 7, 350 * 5), (1, 1, 2, 1), strict=True):
        assert row["model_flops_utilization"] == pytest.approx(computed / (row["step_seconds"] * steps) / peak)
