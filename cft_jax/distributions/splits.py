"""Prompts and splits: families and grids of parameters → the prompts to train on and the prompts to test."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cft_jax.common.errors import UserError
from cft_jax.distributions.families import FAMILIES, HELDOUT_FAMILIES, TRAIN_FAMILIES, Family, find_family
from cft_jax.distributions.grids import GRIDS, Axis, between, resampled

_T = TypeVar("_T")

# What `prompt_text` writes.
_PROMPT = re.compile(
    r"Generate exactly ONE random number from a (?P<family>.+) distribution with parameters (?P<parameters>.+)\. "
    r"Output ONLY the number\."
)
_PARAMETER = re.compile(r"(\w+)=([^,]+)")
TRAIN, UNSEEN, OOD = "train", "test_unseen_params", "test_ood_family"
SPLITS = (TRAIN, UNSEEN, OOD)
# Of the small world alone (`world.py`).
OOD_LISTS = "test_ood_lists"
TEST_SPLITS = (UNSEEN, OOD, OOD_LISTS)


@dataclass(frozen=True)
class PromptSpec:
    """One prompt and the distribution it names; a plain record, nothing is derived or checked.

    `parameters` are in the order in which the prompt prints them.
    """

    split: str
    family_id: str
    distribution_id: str
    parameters: Mapping[str, float | int]
    prompt: str


def build_splits(
    *,
    selection: str = "full_grid",
    train_families: Sequence[str] = (),
    heldout_families: Sequence[str] = (),
    unseen: str = "outside",
    grid_points: int = 0,
    readable_parameters: bool = False,
    parameter_digits: int = 6,
    max_prompts_per_split: int = 0,
) -> dict[str, list[PromptSpec]]:
    """The prompts of the three splits `train`, `test_unseen_params` and `test_ood_family`.

    Order: families as listed; in a family the Cartesian product of its axes, the last axis fastest.

    Args:
      selection: `full_grid`, or `paper_selected` for the paper's few test prompts per family.
      train_families: families to train on, in this order; empty for the paper's 24 (less those held out here).
      heldout_families: families only tested, in this order; empty for the paper's 6 (less those trained on here).
      unseen: where the unseen parameters of the trained families lie: `outside` the trained ranges (the paper's), or
        `inside` them, half-way between neighbouring values of the training grid in every parameter.
      grid_points: values per axis of the training grid, over the paper's ranges; 0 for the paper's own.
      readable_parameters: round parameters and print them in the shortest form; the distribution is that of the
        printed values. Otherwise they print as Python's repr (the paper's prompts).
      parameter_digits: significant digits that the rounding keeps.
      max_prompts_per_split: cap on each of the two test splits, shared out over its families; 0 for none.

    Raises:
      UserError: unknown families or options, a family in both roles, or options that contradict each other.
    """
    for name, value, allowed in (
        ("selection", selection, ("full_grid", "paper_selected")),
        ("unseen", unseen, ("outside", "inside")),
    ):
        if value not in allowed:
            raise UserError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    if selection == "paper_selected" and unseen == "inside":
        raise UserError("selection=paper_selected lists parameters outside the trained ranges; set unseen=outside")
    digits = parameter_digits if readable_parameters else None
    trained, held_out = roles(train_families, heldout_families)
    selected = selection == "paper_selected"
    splits: dict[str, list[PromptSpec]] = {TRAIN: [], UNSEEN: [], OOD: []}
    for family in trained:
        grids = GRIDS[family.family_id]
        main = resampled(family, grids.main, grid_points) if grid_points else grids.main
        if unseen == "outside" and not selected and not grids.beyond:
            raise UserError(f"{family.family_id} has no parameters outside its training grid; set unseen=inside")
        tested = between(family, main) if unseen == "inside" else grids.beyond
        splits[TRAIN] += _specs(TRAIN, family, _points(main), digits)
        splits[UNSEEN] += _specs(UNSEEN, family, grids.selected if selected else _points(tested), digits)
    for family in held_out:
        grids = GRIDS[family.family_id]
        splits[OOD] += _specs(OOD, family, grids.selected if selected else _points(grids.main), digits)
    # A grid so dense that two of its points have one name would test on prompts that were trained on.
    counts = Counter(spec.distribution_id for specs in splits.values() for spec in specs)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"{len(repeated)} distributions occur twice, such as {repeated[0]}; take fewer grid points")
    for name in (UNSEEN, OOD):
        if max_prompts_per_split:
            splits[name] = spread(splits[name], max_prompts_per_split, lambda spec: spec.family_id)
    return splits


def prompt_text(family: Family, parameters: Mapping[str, float | int], *, digits: int | None = None) -> str:
    """The paper's message asking for one number; parameters print as repr, or with `digits` significant digits."""
    values = {name: float(parameters[name]) for name in family.parameter_names}
    shown = ", ".join(
        f"{name}={repr(value) if digits is None else readable_number(value, digits)}" for name, value in values.items()
    )
    return (
        f"Generate exactly ONE random number from a {family.display_name} distribution with parameters {shown}. "
        "Output ONLY the number."
    )


def spec_of_prompt(prompt: str) -> PromptSpec | None:
    """The distribution that one of these messages names; None for other texts and for impossible parameters."""
    found = _PROMPT.fullmatch(prompt.strip())
    family = next((family for family in FAMILIES.values() if found and family.display_name == found["family"]), None)
    if found is None or family is None:
        return None
    try:
        given = {name: float(value) for name, value in _PARAMETER.findall(found["parameters"])}
        family.validate(given)
    except ValueError:  # a UserError among them
        return None
    parameters = {name: given[name] for name in family.parameter_names}
    return PromptSpec("asked", family.family_id, distribution_id(family, parameters), parameters, prompt)


def distribution_id(family: Family, parameters: Mapping[str, float | int]) -> str:
    """A name fit for files: the family's id and every parameter, `-` as `m`, `.` as `p`, at most 6 decimals."""
    parts = [family.family_id]
    for name in family.parameter_names:
        value = float(parameters[name])
        shown = str(int(value)) if value.is_integer() else f"{value:.6f}".rstrip("0").rstrip(".")
        parts.append(f"_{name}_{shown.replace('-', 'm').replace('.', 'p')}")
    return "".join(parts)


def readable_number(value: float, digits: int) -> str:
    """The shortest form of a number: whole ones without a point, others with at most so many significant digits."""
    return str(int(value)) if value.is_integer() else f"{value:.{digits}g}"


def spread(items: Sequence[_T], limit: int, group: Callable[[_T], str]) -> list[_T]:
    """At most `limit` items, shared out evenly over their groups and evenly spaced in each; the order is kept."""
    if limit >= len(items):
        return list(items)
    sizes = Counter(group(item) for item in items)
    quota = dict.fromkeys(sizes, 0)
    left = limit
    while left:
        for name in [name for name in sizes if quota[name] < sizes[name]][:left]:
            quota[name] += 1
            left -= 1
    taken, seen = [], Counter()
    for item in items:
        name = group(item)
        index = seen[name]
        seen[name] += 1
        # The items at which floor(index * quota / size) steps up: `quota` of them, evenly spaced.
        if (index + 1) * quota[name] // sizes[name] > index * quota[name] // sizes[name]:
            taken.append(item)
    return taken


def roles(train_families: Sequence[str], heldout_families: Sequence[str]) -> tuple[list[Family], list[Family]]:
    """The families to train on and those held out; see `build_splits`."""
    both = [name for name in train_families if name in heldout_families]
    if both:
        raise UserError(f"{', '.join(both)} cannot be trained on and held out; take it from one of the two lists")
    for name, given in (("train_families", train_families), ("heldout_families", heldout_families)):
        if len(set(given)) < len(given):
            raise UserError(f"{name}={tuple(given)} names a family twice")
    trained = train_families or [name for name in TRAIN_FAMILIES if name not in heldout_families]
    held_out = heldout_families or [name for name in HELDOUT_FAMILIES if name not in train_families]
    return [find_family(name) for name in trained], [find_family(name) for name in held_out]


def _points(axes: tuple[Axis, ...]) -> Iterable[tuple[float, ...]]:
    return itertools.product(*(axis.values for axis in axes))


def _specs(split: str, family: Family, points: Iterable[tuple[float, ...]], digits: int | None) -> list[PromptSpec]:
    specs = []
    for point in points:
        parameters = family.prompt_parameters(dict(zip(family.grid_parameter_names, point, strict=True)))
        if digits is not None:
            parameters = {name: float(readable_number(value, digits)) for name, value in parameters.items()}
        name, prompt = distribution_id(family, parameters), prompt_text(family, parameters, digits=digits)
        specs.append(PromptSpec(split, family.family_id, name, parameters, prompt))
    return specs
