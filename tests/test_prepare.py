"""The command that prepares the data."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from cft_jax.common.errors import UserError
from cft_jax.config import Config, DataConfig, ModelSettings, ScratchConfig, TrainConfig
from cft_jax.jobs.prepare import prepare_data


def small_config(tmp_path, **data):
    return Config(
        model=ModelSettings(scratch=ScratchConfig(enabled=True)),
        data=DataConfig(
            num_decimals=1,
            max_bins=30,
            train_families=("geometric", "binomial"),
            heldout_families=("poisson",),
            cache_dir=str(tmp_path / "cache"),
            **data,
        ),
        train=TrainConfig(batch_size=4),
    )


def test_figures_count_the_training_split(tmp_path):
    figures, example = prepare_data(small_config(tmp_path))
    # tests/golden/sampling_order.json: the training split has 13 geometric and 44 binomial prompts.
    assert figures["prompts"] == 57
    assert figures["max_children"] <= 11
    assert 0 < figures["padding_fraction"] < 1
    assert figures["values"] > figures["prompts"] and figures["prefixes"] > figures["values"]
    assert "loss at" in example
    again, _ = prepare_data(small_config(tmp_path))
    assert {**again, "seconds": 0, "tokenizer_seconds": 0} == {**figures, "seconds": 0, "tokenizer_seconds": 0}
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_lost_probability_is_said_once_and_most_of_it_refused(tmp_path, caplog):
    """The paper's cut keeps the first integers of a binomial distribution, here one with mean 1,500."""
    rows = [("Count heads.", "binomial", {"n": 2500, "p": 0.6}), ("Wait.", "poisson", {"lambda": 2.0})]
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": prompt, "distribution": {"family": family, "parameters": parameters}}) + "\n"
            for prompt, family, parameters in rows
        )
    )
    config = small_config(tmp_path, custom=str(tmp_path / "rows.jsonl"))

    def prepared(**changes):
        caplog.clear()
        figures, _ = prepare_data(dataclasses.replace(config, data=dataclasses.replace(config.data, **changes)))
        return figures, [record.getMessage() for record in caplog.records if "lose more than" in record.getMessage()]

    for target in ("soft", "hard"):
        figures, said = prepared(max_bins=1511, target=target)
        # scipy.stats.binom.sf(1510, 2500, 0.6) = 0.33449
        assert figures["lost_mass"] == pytest.approx(0.33449, abs=1e-5)
        assert figures["lost_mass_prompt"] == "Count heads."
        assert len(said) == 1 and "1 of 2 prompts lose more than 1 % of their probability, task custom_1" in said[0]
        figures, said = prepared(max_bins=5000, target=target)
        assert figures["lost_mass"] == 0 and "lost_mass_prompt" not in figures and not said
        with pytest.raises(UserError, match=r"task custom_1: 100 % of the probability of binomial .*data.space=full"):
            prepared(max_bins=1001, target=target)


def test_hard_targets_prepare_without_tries(tmp_path):
    figures, _ = prepare_data(small_config(tmp_path, target="hard"))
    assert figures["prompts"] == 57 and "prefixes" not in figures


@pytest.mark.slow
def test_the_command_writes_its_figures(tmp_path, request):
    config = f"--config={request.config.rootpath / 'configs' / 'demo.py'}"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    command = [sys.executable, "-m", "cft_jax.prepare", config, f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert {"prompts", "values", "prefixes", "max_children", "bytes", "seconds"} <= figures.keys()
    assert f"{figures['prefixes']:,}" in done.stdout


def test_mistakes_are_named(tmp_path):
    config = small_config(tmp_path, max_length=9)
    with pytest.raises(UserError, match=r"config\.data\.max_length=9"):
        prepare_data(config)
    elsewhere = dataclasses.replace(config, model=ModelSettings(checkpoint=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="no such directory"):
        prepare_data(elsewhere)
    assert not list(tmp_path.glob("cache/.building-*"))
