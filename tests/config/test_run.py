"""Defaults are the paper's; unknown fields, wrong types and impossible combinations are named."""

import dataclasses

import pytest

from cft_jax.common.errors import UserError
from cft_jax.config import Config, default_config_dict, from_config_dict, paper_config_dict, validate

VALID = {"model": {"checkpoint": "x"}}


def config(**fields) -> Config:
    values = dataclasses.asdict(Config())
    values["model"]["checkpoint"] = "x"
    for path, value in fields.items():
        record = values
        *parents, name = path.split("__")
        for parent in parents:
            record = record[parent]
        record[name] = value
    return from_config_dict(values)


def test_defaults_are_the_papers():  # the settings published with arXiv 2605.11845, soft targets
    c = from_config_dict(default_config_dict())
    assert (c.seed, c.data.num_decimals, c.data.max_bins, c.data.quantile_low, c.data.quantile_high) == (
        11,
        5,
        1001,
        0.001,
        0.999,
    )
    t = c.train
    assert (t.batch_size, t.epochs, t.learning_rate, t.weight_decay, t.warmup_ratio) == (32, 3, 2e-4, 0.01, 0.03)
    assert (t.tau, t.epsilon_smoothing, t.max_grad_norm, c.data.max_length) == (1.0, 1e-8, 0.0, 256)
    lora = c.model.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32.0, 0.05)
    assert lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    hard = paper_config_dict({"1b": "a", "3b": "b"}, "3b-hard")
    assert (hard.model.checkpoint, hard.data.max_bins, hard.train.epochs) == ("b", 16384, 2)
    assert hard.train.samples_per_prompt_per_epoch == 16


def test_a_saved_config_reads_back():
    assert config() == from_config_dict(dataclasses.asdict(config()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trian": {}}, "unknown field config.trian; did you mean config.train"),
        ({"train": {"taus": 1.0}}, "config.train.taus; did you mean config.train.tau"),
        ({"train": {"tau": "hot"}}, "config.train.tau='hot' is of type str; it takes float"),
        ({"train": {"batch_size": 2.5}}, "it takes int"),
        ({"train": {"batch_size": True}}, "it takes int"),
        ({"train": 3}, "must be a record"),
        ({"eval": {"seeds": ("a",)}}, "must hold only int"),
    ],
)
def test_unknown_fields_and_types(values, words):
    with pytest.raises(UserError) as error:
        from_config_dict(values)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train__objective", "paths2", "must be one of path, paths, exact"),
        ("train__learning_rate", 0.0, "greater than 0"),
        ("train__grad_accum_steps", 3, "batch_size=32 is not divisible"),
        ("data__quantile_low", 0.9995, "0 < low < high < 1"),
        ("model__checkpoint", "", "config.model.checkpoint is empty"),
        ("model__lora__dropout", 1.0, "[0, 1)"),
        ("model__lora__enabled", False, "export.format=merged"),
        ("mesh__fsdp", -1, "at most one -1"),
        ("eval__suites", ("structred",), "structred"),
    ],
)
def test_impossible_values_are_named(path, value, words):
    with pytest.raises(UserError) as error:
        validate(config(**{path: value}))
    assert words in str(error.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as error:
        validate(config(train__tau=0.0, data__space="cube", checkpoint__keep=0))
    message = str(error.value)
    assert "train.tau" in message and "data.space='cube'" in message and "checkpoint.keep" in message


def test_the_default_with_a_checkpoint_is_valid():
    validate(config())
