"""Prompts, parameters, names and order against the paper's (tests/golden/splits*.json*), and our own grids."""

import gzip
import hashlib
import json
from collections import Counter

import pytest

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import FAMILIES
from cft_jax.distributions.grids import GRIDS
from cft_jax.distributions.splits import SPLITS, build_splits, distribution_id, spread


@pytest.mark.parametrize("selection", ["full_grid", "paper_selected"])
def test_equals_the_paper(golden, selection):
    with gzip.open(golden / "splits.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["selection"] == selection]
    splits = build_splits(selection=selection)
    assert list(splits) == list(SPLITS)
    specs = [spec for split in SPLITS for spec in splits[split]]
    assert len(specs) == len(rows)
    for spec, row in zip(specs, rows, strict=True):
        assert (spec.split, spec.family_id, spec.distribution_id) == (
            row["split"],
            row["family_id"],
            row["distribution_id"],
        )
        assert list(spec.parameters.items()) == list(row["parameters"].items())
        assert spec.prompt == row["prompt_text"]


@pytest.mark.parametrize("selection", ["full_grid", "paper_selected"])
def test_digests(golden, selection):
    digests = json.loads((golden / "splits_digest.json").read_text())[selection]
    splits = build_splits(selection=selection)
    everything = []
    for split in SPLITS:
        lines = [f"{s.split}\t{s.family_id}\t{s.distribution_id}\t{s.prompt}" for s in splits[split]]
        everything += lines
        assert len(lines) == digests[split]["count"]
        assert dict(Counter(s.family_id for s in splits[split])) == digests[split]["families"]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digests[split]["sha256"]
    assert hashlib.sha256("\n".join(everything).encode()).hexdigest() == digests["_all"]["sha256"]


def test_families_in_the_order_given():
    splits = build_splits(train_families=("gaussian", "uniform"), heldout_families=("poisson",))
    assert list(dict.fromkeys(spec.family_id for spec in splits["train"])) == ["gaussian", "uniform"]
    assert {spec.family_id for spec in splits["test_unseen_params"]} == {"gaussian", "uniform"}
    assert {spec.family_id for spec in splits["test_ood_family"]} == {"poisson"}


def test_roles_can_be_exchanged():
    splits = build_splits(heldout_families=("gamma",))
    assert "gamma" not in {spec.family_id for spec in splits["train"]}
    assert len(splits["test_ood_family"]) == 121  # gamma's training grid, 11 x 11
    splits = build_splits(train_families=("weibull",), unseen="inside")
    assert len(splits["train"]) == 36 and len(splits["test_unseen_params"]) == 25  # 6 x 6 and the 5 x 5 between
    assert "weibull" not in {spec.family_id for spec in splits["test_ood_family"]}
    with pytest.raises(UserError, match="weibull has no parameters outside its training grid; set unseen=inside"):
        build_splits(train_families=("weibull",))


@pytest.mark.parametrize("grid_points", [0, 4, 7])
def test_inside_lies_strictly_between(grid_points):
    splits = build_splits(unseen="inside", grid_points=grid_points)
    trained = {spec.distribution_id for spec in splits["train"]}
    assert trained.isdisjoint(spec.distribution_id for spec in splits["test_unseen_params"])
    for family_id in dict.fromkeys(spec.family_id for spec in splits["train"]):
        family = FAMILIES[family_id]
        seen = [spec.parameters for spec in splits["train"] if spec.family_id == family_id]
        unseen = [spec.parameters for spec in splits["test_unseen_params"] if spec.family_id == family_id]
        assert unseen
        for name in set(family.parameter_names) & set(family.grid_parameter_names):
            values = {parameters[name] for parameters in seen}
            for parameters in unseen:
                family.validate(parameters)
                assert min(values) < parameters[name] < max(values)
                assert parameters[name] not in values
                assert not family.rules[name].whole or parameters[name].is_integer()


def test_midpoints_by_hand():
    splits = build_splits(train_families=("gaussian", "binomial"), heldout_families=("chi",), unseen="inside")
    gaussian = splits["test_unseen_params"][0].parameters
    # The grid starts mu = -2.0, -1.6 and sigma = 0.5, 0.5 * 4**0.1.
    assert gaussian["mu"] == pytest.approx(-1.8)
    assert gaussian["sigma"] == pytest.approx(0.5 * 4**0.05)
    binomial = [s.parameters["n"] for s in splits["test_unseen_params"] if s.family_id == "binomial"]
    assert sorted(set(binomial)) == [7.0, 12.0, 17.0]  # between 5, 10, 15, 20


def test_grid_points_keep_the_ranges():
    splits = build_splits(train_families=("gaussian", "beta_binomial"), grid_points=3)
    gaussian = [spec.parameters for spec in splits["train"] if spec.family_id == "gaussian"]
    assert [(p["mu"], p["sigma"]) for p in gaussian[:3]] == [(-2.0, 0.5), (-2.0, pytest.approx(1.0)), (-2.0, 2.0)]
    assert len(splits["train"]) == 9 + 27


def test_whole_parameters_without_room_between_them_stay():
    splits = build_splits(train_families=("binomial",), grid_points=16, unseen="inside")
    train, unseen = ([spec.parameters for spec in splits[name]] for name in ("train", "test_unseen_params"))
    # The range 5 to 20 of n is full of whole numbers; p lies between.
    assert {p["n"] for p in unseen} == {p["n"] for p in train} == set(range(5, 21))
    assert not {p["p"] for p in unseen} & {p["p"] for p in train}


def test_parameter_digits():
    splits = build_splits(train_families=("gaussian",), readable_parameters=True, parameter_digits=2)
    assert splits["train"][1].parameters == {"mu": -2.0, "sigma": 0.57}  # 0.5 * 4**0.1 = 0.5743
    assert "mu=-2, sigma=0.57." in splits["train"][1].prompt


def test_readable_parameters():
    splits = build_splits(readable_parameters=True)
    prompts = {spec.prompt for spec in splits["train"]}
    assert (
        "Generate exactly ONE random number from a Uniform distribution with parameters a=-2.9, b=-0.7. "
        "Output ONLY the number."
    ) in prompts
    for split in SPLITS:
        for spec in splits[split]:
            shown = dict(part.split("=") for part in spec.prompt.split("parameters ")[1].split(". Out")[0].split(", "))
            assert {name: float(text) for name, text in shown.items()} == dict(spec.parameters)
            assert max(len(text.lstrip("-0.").replace(".", "")) for text in shown.values()) <= 6
            FAMILIES[spec.family_id].validate(spec.parameters)


def test_distribution_id():
    gaussian = FAMILIES["gaussian"]
    assert distribution_id(gaussian, {"mu": -0.1234567, "sigma": 2.0}) == "gaussian_mu_m0p123457_sigma_2"


def test_cap_is_shared_out_over_families():
    splits = build_splits(max_prompts_per_split=50)
    assert len(splits["train"]) == 1988
    counts = Counter(spec.family_id for spec in splits["test_unseen_params"])
    assert sum(counts.values()) == 50 and set(counts.values()) == {2, 3} and len(counts) == 24
    assert len(splits["test_ood_family"]) == 50


def test_spread():
    items = [f"a{i}" for i in range(6)] + ["b0"] + [f"c{i}" for i in range(3)]
    assert spread(items, 6, lambda item: item[0]) == ["a1", "a3", "a5", "b0", "c1", "c2"]
    for limit in range(len(items) + 2):
        taken = spread(items, limit, lambda item: item[0])
        assert len(taken) == min(limit, len(items))
        assert taken == sorted(taken, key=items.index)
        counts = Counter(item[0] for item in taken)
        assert counts["b"] >= min(limit // 3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "half"}, "selection='half' must be one of full_grid, paper_selected"),
        ({"unseen": "between"}, "unseen='between' must be one of outside, inside"),
        ({"selection": "paper_selected", "unseen": "inside"}, "set unseen=outside"),
        ({"train_families": ("gamma",), "heldout_families": ("gamma",)}, "gamma cannot be trained on and held out"),
        ({"train_families": ("gamma", "gamma")}, "names a family twice"),
        ({"train_families": ("gama",)}, "did you mean gamma?"),
        ({"grid_points": 1}, "grid_points=1 must be at least 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError) as error:
        build_splits(**options)
    assert message in str(error.value)


def test_grids_fit_their_families():
    for family_id, grids in GRIDS.items():
        num_axes = len(FAMILIES[family_id].grid_parameter_names)
        assert len(grids.main) == num_axes
        assert len(grids.beyond) in (0, num_axes)
        assert all(len(point) == num_axes for point in grids.selected)
