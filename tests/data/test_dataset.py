"""Batches of a run: what an epoch holds, that batches depend on nothing but the step, and what objectives share."""

import itertools

import numpy as np
import pytest
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.config import Config, DataConfig, TrainConfig
from cft_jax.data.dataset import common_prefix
from cft_jax.data.objectives import (
    AnalyticPaths,
    AnalyticTries,
    DrawnStrings,
    Mixture,
    Paths,
    WholeTries,
    training_dataset,
)
from cft_jax.data.prepared import prepare
from cft_jax.data.spaces import SpaceTable, task_space
from cft_jax.distributions import OutputSpace, PromptSpec, Task, task_from_spec
from cft_jax.text.scratch import train_tokenizer
from cft_jax.text.values import ValueEncoder

FAMILIES = {
    "binomial": [{"n": float(n), "p": 0.4} for n in (5, 12, 30)],
    "bernoulli": [{"p": p} for p in (0.2, 0.5)],
    "gaussian": [{"mu": float(mu), "sigma": 0.5} for mu in range(4)],
}
COIN = OutputSpace(("heads", "tails", "he"), np.array([0.25, 0.5, 0.25]))


def make_tasks(weight=1.0):
    tasks = []
    for family, grid in FAMILIES.items():
        for number, parameters in enumerate(grid):
            spec = PromptSpec("train", family, f"{family}_{number}", parameters, f"Draw {family} {parameters}.")
            tasks.append(task_from_spec(spec))
    message = {"role": "user", "content": "Toss a coin."}
    return [*tasks, Task("train", "custom", "coin", (message,), space=COIN, weight=weight)]


@pytest.fixture(scope="module")
def tokenizer():
    """Reads numbers digit by digit, so that full resolution is possible."""
    return train_tokenizer([task.messages[0]["content"] for task in make_tasks()] * 2, vocab_size=400)


@pytest.fixture
def dataset(tokenizer, tmp_path):
    def make(tasks=None, data=None, *, row_multiple=1, share_prefix=False, **train):
        settings = {"num_decimals": 1, "max_bins": 100, "cache_dir": str(tmp_path), **(data or {})}
        config = Config(data=DataConfig(**settings), train=TrainConfig(**{"batch_size": 4, **train}))
        chosen = make_tasks() if tasks is None else tasks
        return training_dataset(config, tokenizer, chosen, row_multiple=row_multiple, share_prefix=share_prefix)

    return make


HARD = {"target": "hard"}
FULL = {"space": "full"}
KINDS = {
    "path": ({}, {}),
    "paths": ({}, {"objective": "paths", "paths_per_prompt": 2, "samples_per_prompt_per_epoch": 4}),
    "exact": ({}, {"objective": "exact", "exact_max_nodes": 20}),
    "hard": (HARD, {"samples_per_prompt_per_epoch": 3}),
    "hard packed": (HARD, {"objective": "paths", "paths_per_prompt": 4, "samples_per_prompt_per_epoch": 4}),
    "path in packed rows": ({}, {"row_tokens": 100}),
    "full path": (FULL, {}),
    "full exact": (FULL, {"objective": "exact", "exact_max_nodes": 20, "paths_per_prompt": 3}),
    "full hard": ({**FULL, **HARD}, {}),
}


def assert_same(left, right):
    for name, array in left._asdict().items():
        np.testing.assert_array_equal(array, getattr(right, name), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_depends_on_its_step_alone(dataset, kind):
    data, train = KINDS[kind]
    forwards, backwards = dataset(data=data, **train), dataset(data=data, **train)
    steps = range(2 * forwards.steps_per_epoch)
    batches = [forwards.batch(step) for step in steps]
    for step in reversed(steps):
        assert_same(backwards.batch(step), batches[step])
    assert any(not np.array_equal(batches[0].tokens, batch.tokens) for batch in batches[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_counts_every_example_once(dataset, kind):
    data, train = KINDS[kind]
    made = dataset(data=data, **train)
    batches = [made.batch(step) for step in range(made.steps_per_epoch)]
    if data.get("target") != "hard":
        assert sum(float(batch.row_weight.sum()) for batch in batches) == made.num_examples
    else:
        assert sum(float(batch.row_weight.sum()) for batch in batches) == pytest.approx(
            sum(float(batch.target_weight.sum()) for batch in batches)
        )
    names = list(itertools.chain.from_iterable(made.task_names(step) for step in range(made.steps_per_epoch)))
    visits = len(names) // len(make_tasks())
    assert sorted(names) == sorted([task.task_id for task in make_tasks()] * visits)


@pytest.mark.parametrize("kind", KINDS)
def test_few_shapes_hold_all_batches(dataset, kind):
    data, train = KINDS[kind]
    made = dataset(data=data, row_multiple=3, **train)
    batches = [made.batch(step) for step in range(6 * made.steps_per_epoch)]
    shapes = {(*batch.tokens.shape, batch.target_index.shape[1], batch.target_ids.shape[1]) for batch in batches}
    assert len(shapes) <= len(made.shapes) + 2
    assert len(made.shapes) <= 3
    assert all(shape[0] % 3 == 0 for shape in shapes)


def test_draws_do_not_depend_on_the_batch_size(dataset, tokenizer):
    def strings(batch_size):
        made = dataset(batch_size=batch_size)
        found = []
        for step in range(made.steps_per_epoch):
            batch = made.batch(step)
            for row in np.flatnonzero(batch.row_weight):
                tokens = batch.tokens[row, : int((batch.subtree_end[row] > 0).sum())]
                found.append(tokenizer.decode(tokens))
        return found

    assert strings(2) == strings(3) == strings(10)


def test_drawn_strings_follow_the_space(dataset, tokenizer):
    coin = make_tasks()[-1]
    made = dataset([coin], samples_per_prompt_per_epoch=1000, batch_size=100, data=HARD)
    answers = []
    for step in range(2 * made.steps_per_epoch):
        batch = made.batch(step)
        for row in range(100):
            answer = batch.tokens[row, batch.target_index[row, 0] + 1 : int((batch.subtree_end[row] > 0).sum())]
            answers.append(tokenizer.decode(answer))
    counts = [answers.count(value) for value in COIN.values]
    # 2,000 draws; p > 1e-4 fails once in 10,000 seeds.
    assert stats.chisquare(counts, 2000 * COIN.probabilities).pvalue > 1e-4


@pytest.fixture
def prepared(tokenizer, tmp_path):
    def make(**data):
        settings = {"num_decimals": 1, "max_bins": 100, "cache_dir": str(tmp_path), **data}
        return prepare(tokenizer, make_tasks(), DataConfig(**settings))

    return make


TASKS = np.array([0, 3, 9, 5, 0])


def uniforms(strings):
    return np.random.default_rng(5).random((TASKS.size, strings))


def ones():
    return np.ones(len(make_tasks()))


@pytest.mark.parametrize("per_position", [True, False])
def test_packed_soft_strings_are_the_strings_alone(prepared, batch_of, steps_of, loss_of, per_position):
    found = prepared()
    source = Paths(found.prompts, ones(), per_position, found.forest)
    packed = batch_of(source.examples(TASKS, uniforms(6)))
    alone = batch_of(source.examples(np.repeat(TASKS, 6), uniforms(6).reshape(-1, 1)))
    assert packed.row_weight.sum() == alone.row_weight.sum() == 30
    losses = [loss_of(steps_of(batch, found.prompts), batch.row_weight) for batch in (packed, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def hard_source(tokenizer, found, **data):
    settings = DataConfig(num_decimals=1, max_bins=100, **data)
    table = SpaceTable(task_space(task, settings) for task in make_tasks())
    names = [task.task_id for task in make_tasks()]
    return DrawnStrings(found.prompts, ones(), table, names, ValueEncoder(tokenizer), found.forest.terminator_id)


@pytest.mark.parametrize("space", ["grid", "full"])
def test_packed_hard_strings_are_the_strings_alone(prepared, tokenizer, batch_of, steps_of, loss_of, space):
    found = prepared()
    source = hard_source(tokenizer, found, space=space)
    packed = batch_of(source.examples(TASKS, uniforms(6)), epsilon=None)
    alone = batch_of(source.examples(np.repeat(TASKS, 6), uniforms(6).reshape(-1, 1)), epsilon=None)
    steps = [steps_of(batch, found.prompts) for batch in (packed, alone)]
    assert all(list(targets.values()) == [1.0] and weight == 1 for _, _, weight, targets in steps[1])
    assert packed.row_weight.sum() == alone.row_weight.sum() == len(steps[1])
    assert loss_of(steps[0], packed.row_weight) == pytest.approx(loss_of(steps[1], alone.row_weight), rel=1e-6)
    assert len(steps[0]) < len(steps[1])


def test_soft_and_hard_draw_the_same_strings(prepared, tokenizer, batch_of, steps_of):
    found = prepared()
    soft = steps_of(
        batch_of(Paths(found.prompts, ones(), True, found.forest).examples(TASKS, uniforms(3))), found.prompts
    )
    hard = steps_of(batch_of(hard_source(tokenizer, found).examples(TASKS, uniforms(3)), epsilon=None), found.prompts)
    assert [step[:2] for step in soft] == [step[:2] for step in hard]


def test_full_resolution_of_integers_is_their_grid(prepared, batch_of, steps_of):
    # The bernoulli's and the binomials' grids hold every integer, so that both spaces are the same.
    tasks = np.array([0, 1, 3, 4])
    draws = np.random.default_rng(2).random((4, 3))
    grid, full = prepared(), prepared(space="full")
    listed = Paths(grid.prompts, ones(), True, grid.forest).examples(tasks, draws)
    sources = [
        Paths(full.prompts[-1:], ones(), True, full.forest),
        AnalyticPaths(full.prompts, ones(), True, full.analytic),
    ]
    analytic = Mixture(sources, full.is_analytic.astype(np.int64)).examples(tasks, draws)
    left, right = (steps_of(batch_of(examples), grid.prompts) for examples in (listed, analytic))
    assert [step[:3] for step in left] == [step[:3] for step in right]
    for (*_, expected), (*_, targets) in zip(left, right, strict=True):
        assert targets == pytest.approx(expected, rel=1e-6)


def test_exact_at_full_resolution_is_exact_where_everything_fits(prepared, batch_of, steps_of):
    tasks = np.array([0, 1, 3])
    grid, full = prepared(), prepared(space="full")
    none = np.zeros((3, 0))
    listed = WholeTries(grid.prompts, ones(), True, grid.forest, 1000).examples(tasks, none)
    analytic = AnalyticTries(full.prompts[:-1], ones(), True, full.analytic, 1000).examples(tasks, none)
    left, right = (sorted(steps_of(batch_of(examples), grid.prompts), key=repr) for examples in (listed, analytic))
    assert [step[:2] for step in left] == [step[:2] for step in right]
    for (*_, weight, expected), (*_, found_weight, targets) in zip(left, right, strict=True):
        assert found_weight == pytest.approx(weight, rel=1e-5)
        assert targets == pytest.approx(expected, rel=1e-5)


def test_task_weights_weigh_strings_but_not_the_mean(dataset):
    plain, weighted = dataset(), dataset(make_tasks(weight=11.0))
    totals = [sum(float(d.batch(s).target_weight.sum()) for s in range(d.steps_per_epoch)) for d in (plain, weighted)]
    assert totals == pytest.approx([10, 10], rel=1e-6)
    assert weighted.batch(0).row_weight.tolist() == plain.batch(0).row_weight.tolist()
    step = next(s for s in range(3) if "coin" in weighted.task_names(s))
    row = weighted.task_names(step).index("coin")
    # By hand: weights 1 (nine times) and 11 have the mean 2.
    assert weighted.batch(step).target_weight[row].sum() == pytest.approx(5.5)


def test_a_shared_prefix_is_in_every_prompt(dataset, prepared):
    whole, rest = dataset(), dataset(share_prefix=True)
    shared_prefix = rest.shared_prefix
    assert whole.shared_prefix.size == 0 < shared_prefix.size
    assert all(prompt[: shared_prefix.size].tolist() == shared_prefix.tolist() for prompt in prepared().prompts)
    for step in range(3):
        left, right = whole.batch(step), rest.batch(step)
        num_tokens = (right.subtree_end > 0).sum(axis=1)
        for row, count in enumerate(num_tokens):
            after = slice(shared_prefix.size, shared_prefix.size + count)
            np.testing.assert_array_equal(left.tokens[row, after], right.tokens[row, :count])
            np.testing.assert_array_equal(left.positions[row, after], right.positions[row, :count])


def test_the_common_prefix_leaves_a_token_of_every_prompt():
    def shared_prefix(*prompts):
        return common_prefix([np.array(prompt, dtype=np.int32) for prompt in prompts]).tolist()

    assert shared_prefix([1, 2, 3, 4], [1, 2, 4]) == [1, 2]
    assert shared_prefix([1, 2, 3], [1, 2]) == [1]
    assert shared_prefix([1, 2, 3]) == [1, 2]
    assert shared_prefix([1], [2, 3]) == []


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"objective": "paths", "paths_per_prompt": 3}, r"batch_size=4 .*paths_per_prompt=3"),
        (
            {"objective": "paths", "paths_per_prompt": 2, "samples_per_prompt_per_epoch": 3},
            r"samples_per_prompt_per_epoch=3 .*paths_per_prompt=2",
        ),
        ({"objective": "exact", "exact_max_nodes": 3}, r"exact_max_nodes=3 must be greater than \d"),
    ],
)
def test_counts_that_do_not_fit_are_errors(dataset, train, message):
    with pytest.raises(UserError, match=message):
        dataset(**train)


@pytest.mark.parametrize("data", [{}, HARD, FULL])
def test_a_prompt_that_is_too_long_is_named(dataset, data):
    long = make_tasks()[0]
    message = {"role": "user", "content": "Please. " * 200}
    tasks = [*make_tasks(), Task("train", "custom", "talker", (message,), spec=long.spec)]
    with pytest.raises(UserError, match=r"task talker: .* more than config\.data\.max_length=256 \(1 of 11 tasks\)"):
        dataset(tasks, data)


def test_an_answer_that_is_too_long_is_seen_for_hard_targets(dataset):
    space = OutputSpace(("short", "x" * 300), np.array([0.5, 0.5]))
    tasks = [Task("train", "custom", "writer", ({"role": "user", "content": "Write."},), space=space)]
    with pytest.raises(UserError, match="task writer"):
        dataset(tasks, HARD)


def test_no_tasks_is_an_error(dataset):
    with pytest.raises(UserError, match="nothing to train on"):
        dataset([])
