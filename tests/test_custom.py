"""The worked example of custom data trains on CPU."""

import json
from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.config import Config, DataConfig, ModelSettings
from cft_jax.distributions import read_tasks
from cft_jax.distributions.tasks import digest_of_tasks
from cft_jax.main import run
from cft_jax.runs.workdir import setting_up

ROOT = Path(__file__).parents[1]


def test_a_file_that_changes_under_a_run_stops_it_at_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Coin?", "counts": {"heads": 1, "tails": 1}}\n')
    config = Config(data=DataConfig(custom=str(rows)), model=ModelSettings(checkpoint=str(tmp_path / "absent")))
    trained = digest_of_tasks(read_tasks(rows))
    workdir = Workdir(tmp_path / "run")
    with setting_up(workdir, config, devices="cpu", write=True, tasks=trained):
        pass
    before = (tmp_path / "run" / "config.json").read_bytes()
    rows.write_text('{"prompt": "Coin?", "counts": {"heads": 1, "tails": 2}}\n')
    with pytest.raises(UserError, match=r"restore the rows of config\.data\.custom, or name a new --workdir"):
        run(config, workdir.path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.slow
def test_the_worked_example_is_learned(tmp_path, command):
    workdir = tmp_path / "run"
    code, _, err = command(
        "main",
        f"--config={ROOT / 'configs' / 'custom.py'}",
        f"--workdir={workdir}",
        "--config.train.epochs=50",
        "--config.eval.num_samples=50",
        "--config.export.enabled=False",
    )
    assert code == 0, err
    stages = json.loads((workdir / "summary.json").read_text())["evaluations"]["structured"]
    before, after = stages["before"]["train"], stages["after"]["train"]
    # The nine rows of configs/custom.jsonl are of two groups: custom, and the exponential one.
    assert after["num_prompts"] == 9 and after["num_families"] == 2
    # All 150 steps reach 0.008 (configs/custom.py); a third of them is well on the way from 1.
    assert before["exact"]["total_variation"] > 0.99
    assert after["exact"]["total_variation"] < 0.3
    assert after["exact"]["kl"] < 0.05 * before["exact"]["kl"]
