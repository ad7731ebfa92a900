"""A small world in which calibration, transfer and forgetting all happen: tasks for a model that trains in minutes.

`habits` is what its base learns: numbers of every family and words of every list, each prompt with a few favourite
answers as chat models have them, and the questions of `questions.py` with their right answers. `fair` is what the base
is then calibrated to: the distributions that the prompts name, of some families and of half of the lists, and for the
tests also of the others.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from cft_jax.distributions.families import Family, find_family
from cft_jax.distributions.output_space import OutputSpace
from cft_jax.distributions.questions import questions
from cft_jax.distributions.splits import OOD, OOD_LISTS, TRAIN, UNSEEN, PromptSpec, build_splits, roles, spread
from cft_jax.distributions.tasks import SpaceSettings, Task, task_from_spec

_LISTS = """
colour: red blue green yellow purple orange black white
animal: dog cat horse cow sheep goat pig rabbit
city: London Madrid Tokyo Berlin Toronto Sydney Mumbai Dakar
fruit: apple banana cherry grape lemon melon peach plum
tree: oak elm ash birch pine cedar willow maple
metal: iron copper zinc tin lead silver nickel cobalt
instrument: piano violin flute drum harp trumpet guitar cello
planet: Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune
drink: tea coffee milk water juice cocoa cider lemonade
first name: Anna Boris Clara David Elena Felix Greta Hugo
season: spring summer autumn winter
weekday: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
month: January February March April May June July August September October November December
side of a coin: heads tails
flower: rose tulip lily daisy violet poppy iris orchid
spice: pepper cumin ginger saffron paprika nutmeg clove anise
garment: shirt coat sock scarf glove skirt jacket belt
room: kitchen bedroom bathroom attic cellar hall study garage
tool: hammer saw drill wrench chisel pliers file axe
vehicle: car bus train bicycle tram truck ferry scooter
sport: tennis rugby hockey cricket golf rowing boxing judo
language: Greek Arabic Hindi Swahili Finnish Korean Basque Welsh
ocean: Atlantic Pacific Indian Arctic Southern
river: Nile Amazon Danube Rhine Volga Ganges Mekong Thames
bird: owl eagle swan robin crow heron finch stork
fish: trout salmon carp pike cod tuna herring perch
insect: ant bee wasp moth beetle cricket fly gnat
gem: ruby opal diamond emerald topaz pearl amber jade
shape: circle square triangle oval star cube cone cross
vegetable: carrot potato onion leek cabbage spinach celery turnip
cheese: brie feta gouda cheddar edam parmesan ricotta gruyere
dance: waltz tango polka samba rumba salsa foxtrot swing
fabric: cotton silk wool linen velvet denim satin felt
weather: sun rain snow fog hail wind frost storm
feeling: joy fear anger envy pride hope grief shame
job: baker teacher nurse farmer pilot tailor lawyer miner
school subject: history physics biology music art chemistry latin algebra
chess piece: king queen rook bishop knight pawn
card suit: hearts spades clubs diamonds
compass point: north south east west
"""
_TRAINED_WORDINGS = (
    "Pick a random {}.",
    "Name one {} at random.",
    "Choose any {}. Answer with one word.",
    "Give me a {}, no matter which.",
    "Draw one {} by lot.",
    "Which {} comes to your mind first?",
)
_UNSEEN_WORDINGS = ("Say any {} you like.", "I need a random {}, just one.")
LISTS = "lists"
# Values per axis of a family's grid, by how many axes it has; and how many of the grid's prompts there are. Odd, so
# that what lies in the middle, most often 0 or 1, is asked in training: whole numbers are written in another way.
_GRID_POINTS = {1: 61, 2: 31, 3: 11, 4: 5}
_ASKED = {"habits": 48, "fair": 400}
_TESTED = 24
# An epoch visits the groups of its prompts in turn: were they of unlike sizes, its end would have none of the small.
_GROUP = 40
# What a prompt weighs in training, where it is not one of numbers.
_WEIGHTS = {LISTS: 3.0, "questions": 3.0}
# How probable the favourite of a list is: one of these.
_FAVOURITES = (0.75, 0.8, 0.85, 0.9)
# The favourite numbers: the roundest within so much of some quantiles of the distribution, and how probable they are.
_QUANTILES, _SHARES, _NEAR = (0.5, 0.75, 0.25), (0.9, 0.07, 0.03), 0.2


def world_tasks(
    kind: str, *, train_families: Sequence[str], heldout_families: Sequence[str], settings: SpaceSettings
) -> dict[str, list[Task]]:
    """Tasks by split, of which `fair` and `habits` have the same prompts to test.

    Args:
      kind: "habits" or "fair".
      train_families: families that `fair` trains on, in this order; empty for the paper's 24.
      heldout_families: families that only `habits` trains on, in this order; empty for the paper's 6.
      settings: how the families' numbers are written.

    Raises:
      UserError: unknown families, or a family in both roles.
      ValueError: there is no such kind.
    """
    if kind not in ("habits", "fair"):
        raise ValueError(f"kind={kind!r} must be habits or fair")
    trained, held_out = roles(train_families, heldout_families)
    asked = _number_prompts(TRAIN, [*trained, *held_out], _ASKED[kind])
    tested = _number_prompts(UNSEEN, [*trained, *held_out], _TESTED)
    only_tested = {family.family_id for family in held_out}
    tasks: dict[str, list[Task]] = {TRAIN: [], UNSEEN: [], OOD: [], OOD_LISTS: []}
    for spec in tested:
        split = OOD if spec.family_id in only_tested else UNSEEN
        tasks[split].append(task_from_spec(replace(spec, split=split)))
    if kind == "habits":
        tasks[TRAIN] += [_with_favourites(task_from_spec(spec), settings) for spec in asked]
        # Twice in an epoch: parameters are understood from different prompts, but facts are learned by heart.
        tasks[TRAIN] += [*(replace(task, split=TRAIN) for task in _list_tasks(fair=False)), *_question_tasks()] * 2
    else:
        tasks[TRAIN] += [task_from_spec(spec) for spec in asked if spec.family_id not in only_tested]
    for task in _list_tasks(fair=True):
        if task.split != TRAIN or kind == "fair":
            tasks[task.split].append(task)
    tasks[TRAIN] = [replace(task, group=f"{n // _GROUP}") for n, task in enumerate(tasks[TRAIN])]
    return tasks


def _number_prompts(split: str, families: Sequence[Family], limit: int) -> list[PromptSpec]:
    """So many prompts of each family, evenly spread over its grid (`train`) or over the points between."""
    return [
        spec
        for family in families
        for spec in spread(_grid(family.family_id)[split], limit, lambda spec: spec.family_id)
    ]


@cache
def _grid(family_id: str) -> dict[str, list[PromptSpec]]:
    return build_splits(
        train_families=[family_id],
        unseen="inside",
        grid_points=_GRID_POINTS[len(find_family(family_id).grid_parameter_names)],
        readable_parameters=True,
        parameter_digits=3,
    )


def _with_favourites(task: Task, settings: SpaceSettings) -> Task:
    """The task with a few favourite answers, round values in the middle of its distribution, in place of that."""
    space = task.output_space(settings)
    below = np.cumsum(space.probabilities)
    shares: dict[str, float] = defaultdict(float)
    for quantile, share in zip(_QUANTILES, _SHARES, strict=True):
        first, at, last = np.searchsorted(below, (quantile - _NEAR, quantile, quantile + _NEAR)).tolist()
        near = range(first, min(last, len(space.values) - 1) + 1)
        shares[space.values[min(near, key=lambda index: (_digits(space.values[index]), abs(index - at)))]] += share
    return replace(task, spec=None, space=OutputSpace(tuple(shares), np.array(list(shares.values()))))


def _digits(number: str) -> int:
    """How many significant digits a number is written with: 1 of "30", "-0.5" and "2.0"."""
    return len(number.replace(".", "").strip("-0"))


def _list_tasks(*, fair: bool) -> Iterator[Task]:
    """Every list in every wording: every other list is trained, in all but a few wordings; the others are tested."""
    rng = random.Random(0)
    for number, line in enumerate(_LISTS.strip().splitlines()):
        name, words = line.split(": ")
        values = tuple(words.split())
        favourite, share = rng.randrange(len(values)), rng.choice(_FAVOURITES)
        probabilities = np.full(len(values), (1 - share) / (len(values) - 1))
        probabilities[favourite] = share
        space = OutputSpace(values, np.full(len(values), 1 / len(values)) if fair else probabilities)
        for index, wording in enumerate((*_TRAINED_WORDINGS, *_UNSEEN_WORDINGS)):
            split = OOD_LISTS if number % 2 else UNSEEN if index >= len(_TRAINED_WORDINGS) else TRAIN
            messages = ({"role": "user", "content": wording.format(name)},)
            yield Task(split, LISTS, f"list_{number}_{index}", messages, space=space, weight=_WEIGHTS[LISTS])


def _question_tasks() -> Iterator[Task]:
    for number, question in enumerate(questions()):
        messages = ({"role": "user", "content": question.prompt},)
        space = OutputSpace((question.answer,), np.ones(1))
        yield Task(TRAIN, question.topic, f"question_{number}", messages, space=space, weight=_WEIGHTS["questions"])
