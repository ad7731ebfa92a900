"""Defaults are the paper's; unknown fields, wrong types and impossible combinations are named."""

import dataclasses

import pytest

from cft_jax.common.errors import UserError
from cft_jax.config import (
    Config,
    default_config_dict,
    from_config_dict,
    load_config,
    paper_config_dict,
    validate,
)
from cft_jax.config.records import read_override

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
        ("data__tail_policy", "clip_to_edge_bins", "must be one of clip_to_edge_bin, drop"),
        ("suite__perplexity__stride", 4096, "stride=4096 must be at most context_length"),
        ("train__keep__weight", -0.1, "at least 0"),
        ("train__keep__source", "", "must be self or a file"),
        ("model__lora__strength", 1.6, "from 0 to 1.5"),
        ("suite__noveltybench__stages", (), "must be some of generate, partition, score"),
    ],
)
def test_impossible_values_are_named(path, value, words):
    with pytest.raises(UserError) as error:
        validate(config(**{path: value}))
    assert words in str(error.value)


KEPT = {"train__keep__weight": 0.1}
SCRATCH = {
    "model__scratch__enabled": True,
    "model__lora__enabled": False,
    "model__checkpoint": "",
    "export__format": "merged",
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (KEPT | {"train__keep__rows": 0}, "config.train.keep.rows=0 keeps nothing; take at least one"),
        (
            KEPT | {"train__keep__kind": "off_support", "model__lora__enabled": False, "export__format": "merged"},
            "set config.model.lora.enabled=True",
        ),
        (KEPT | {"train__keep__kind": "off_support", "data__target": "hard"}, "set config.data.target=soft"),
        (
            KEPT | {"model__scratch__enabled": True, "model__lora__enabled": False, "export__format": "merged"},
            "a randomly initialised model has nothing to keep",
        ),
        (
            SCRATCH | {"model__scratch__num_kv_heads": 3},
            "config.model.scratch.num_kv_heads=3 must divide config.model.scratch.num_heads=4",
        ),
        (SCRATCH | {"model__scratch__num_kv_heads": 0}, "config.model.scratch.num_kv_heads=0 must be at least 1"),
        (SCRATCH | {"model__scratch__head_dim": 7}, "config.model.scratch.head_dim=7 must be an even number"),
        ({"data__world": "fair", "data__custom": "rows.jsonl"}, "two sources of prompts; give one of them"),
        ({"model__base": "world"}, "are two models to start from; leave one of them empty"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, words):
    with pytest.raises(UserError) as error:
        validate(config(**fields))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train__weighting": "sequence", "data__target": "hard"}, "config.data.target=soft"),
        ({"train__tau": 2.0, "data__target": "hard"}, "config.data.target=soft"),
        ({"train__paths_per_prompt": 4}, "config.train.objective=paths, or exact and config.data.space=full"),
        ({"train__paths_per_prompt": 4, "train__objective": "exact"}, "config.train.objective=paths, or exact and"),
        ({"train__exact_max_nodes": 99}, "config.train.objective=exact"),
        ({"train__samples_per_prompt_per_epoch": 4, "train__objective": "exact"}, "config.train.objective=path or"),
        ({"data__full_quantile": 1e-4}, "config.data.space=full"),
        ({"data__grid_points": 5, "data__world": "fair"}, "config.data.world=none"),
        ({"train__keep__rows": 8}, "config.train.keep.weight above 0"),
        ({"train__keep__kind": "replay"}, "config.train.keep.weight above 0"),
        (
            {"train__keep__source": "a.txt", **KEPT, "train__keep__kind": "off_support"},
            "config.train.keep.weight above",
        ),
        ({"train__keep__prompts": "p", **KEPT, "train__keep__source": "a.txt"}, "config.train.keep.weight above 0 and"),
        ({"data__parameter_digits": 3}, "config.data.readable_parameters=True"),
        ({"tasks": ("arc_easy",)}, "retention in config.eval.suites"),
        ({"suite__lm_eval__limit": 10, "eval__suites": ("retention",)}, "config.tasks"),
    ],
)
def test_what_would_be_ignored_in_silence_is_refused(fields, words):
    name = next(iter(fields)).replace("__", ".")
    with pytest.raises(UserError) as error:
        validate(config(**fields))
    message = str(error.value)
    assert message.startswith(f"config.{name}=") and f"counts only with {words}" in message
    assert "set that, or leave it at " in message and ";" not in message.replace("; set that", "")


def test_what_counts_is_accepted():
    validate(config(train__objective="exact", data__space="full", train__paths_per_prompt=3, data__full_quantile=1e-4))
    validate(config(train__objective="paths", train__paths_per_prompt=4, train__weighting="sequence"))
    for suite in ("retention", "all"):
        validate(config(tasks=("arc_easy",), eval__suites=(suite,), suite__lm_eval__limit=10))
    hard = from_config_dict(paper_config_dict({"1b": "a"}, "1b-hard"))
    validate(dataclasses.replace(hard, data=dataclasses.replace(hard.data, space="full")))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.batch_size=64", 64),
        ("mesh.fsdp=-1", -1),
        ("train.learning_rate=3e-3", 3e-3),
        ("train.tau=2", 2.0),
        ("eval.enabled=false", False),
        ("model.lora.enabled=True", True),
        ("model.checkpoint=/a b=c:d", "/a b=c:d"),
        ("data.custom=", ""),
        ("eval.seeds=11,12", (11, 12)),
        ("eval.seeds=(11, 12)", (11, 12)),
        ("data.train_families=gaussian,", ("gaussian",)),
        ("model.lora.targets=['q_proj', \"v_proj\"]", ("q_proj", "v_proj")),
        ("tasks=", ()),
    ],
)
def test_overrides_of_every_type(override, value):
    path, found = read_override(Config(), override)
    assert ".".join(path) == override.partition("=")[0]
    assert found == value and type(found) is type(value)


def test_overrides_change_fields_of_the_file(tmp_path):
    """Also where the file shares a value by reference; the last of two overrides counts."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from cft_jax.config import default_config_dict\n\n\ndef get_config(arg):\n"
        "    config = default_config_dict()\n    config.model.checkpoint = arg\n"
        "    config.eval.max_new_tokens = config.suite.mcq.get_ref('max_new_tokens')\n    return config\n"
    )
    found = load_config(f"{file}:a:b", ["suite.mcq.max_new_tokens=7", "train.tau=2", "train.tau=3"])
    assert (found.model.checkpoint, found.eval.max_new_tokens, found.train.tau) == ("a:b", 7, 3.0)
    with pytest.raises(UserError, match=r"mine\.py: this config file needs an argument after a colon"):
        load_config(str(file))


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as error:
        validate(config(train__tau=0.0, data__space="cube", checkpoint__keep=0))
    message = str(error.value)
    assert "train.tau" in message and "data.space='cube'" in message and "checkpoint.keep" in message


def test_the_default_with_a_checkpoint_is_valid():
    validate(config())
