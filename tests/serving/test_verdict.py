"""The statistics on draws of known distributions: honest ones pass, and what each mistake does to them is seen."""

import math

import numpy as np
import pytest

from cft_jax.distributions import SpaceSettings, build_splits, task_from_spec
from cft_jax.serving.draws import Draws, Layout, Reports, StepProbs, path_of
from cft_jax.serving.mistakes import applied, maximum_likelihood, unstopped
from cft_jax.serving.verdict import FALSE_ALARM, MOST_KL, as_likely, blind_test, causes, judge, kl_to_server
from cft_jax.text.trie import grow_forest, token_matrix

END = 0


def trie_of(values, probabilities):
    tokens, lengths = token_matrix([[ord(character) for character in value] for value in values])
    groups = np.zeros(lengths.size, np.int64)
    return grow_forest(tokens, lengths, groups, np.asarray(probabilities), terminator_id=END, describe=str).trie(0)


@pytest.fixture(scope="module")
def layout():
    """Six prompts of the families, answers with a decimal."""
    families = {"train_families": ("gaussian", "exponential", "poisson"), "heldout_families": ("gumbel",)}
    specs = build_splits(**families, unseen="inside", grid_points=2)["train"]
    spaces = [task_from_spec(spec).output_space(SpaceSettings(1, 121)) for spec in specs[:: len(specs) // 6][:6]]
    return Layout([trie_of(space.values, space.probabilities) for space in spaces])


def near(layout, *, seed, noise, left=0.002):
    """A model's steps: those of the targets, with noise in their logits; `left` is the probability of other tokens."""
    rng = np.random.default_rng(seed)
    scores = np.log(np.maximum(np.concatenate([trie.child_probs for trie in layout.tries]), 1e-9))
    probs = np.exp(scores + noise * rng.standard_normal(scores.size))
    total = layout.sums(probs)[layout.prefix]
    return StepProbs(np.log(probs / total * (1 - left)), np.full(layout.starts.size, math.log(left)))


@pytest.fixture(scope="module")
def model(layout):
    return near(layout, seed=0, noise=0.15)


def draw(layout, probs, *, seed, num=200):
    """Answers to every prompt, drawn step by step."""
    rng = np.random.default_rng(seed)
    taken, left = np.zeros(layout.child_starts[-1]), np.zeros(layout.starts.size)
    for trie, child, prefix in zip(layout.tries, layout.child_starts, layout.prefix_starts, strict=False):
        visits = np.zeros(trie.num_prefixes, np.int64)
        visits[0] = num
        for here in np.arange(trie.num_prefixes):
            own = slice(*(child + trie.child_offsets[here : here + 2]))
            p = np.append(np.exp(probs.log_probs[own]), np.exp(probs.log_left[prefix + here]))
            counts = rng.multinomial(visits[here], p / p.sum())
            taken[own], left[prefix + here] = counts[:-1], counts[-1]
            leads = trie.child_prefix[slice(*trie.child_offsets[here : here + 2])]
            visits[leads[leads >= 0]] = counts[:-1][leads >= 0]
    return Draws(layout, taken, left)


def test_twenty_of_twenty_honest_servers_pass(layout, model):
    variants = {"another": near(layout, seed=1, noise=0.3)}
    for seed in range(20):
        verdict = judge(draw(layout, model, seed=seed), model, variants, reported=None, repetition=None)
        assert verdict.calibrated
        assert abs(verdict.temperature.value - 1) < 4 * verdict.temperature.error


def test_the_evidence_of_known_mistakes_is_bounded(layout, model):
    """Markov: the average likelihood ratio of honest draws is 1 at most, so it rarely exceeds 20."""
    found = [
        judge(draw(layout, model, seed=seed, num=40), model, {}, reported=None, repetition=None).log_evidence
        for seed in range(60)
    ]
    assert np.mean(np.array(found) > math.log(20)) <= 0.05


def source(layout, name):
    return {"base model": near(layout, seed=2, noise=1.0, left=0.05), "doubled BOS": near(layout, seed=3, noise=0.3)}[
        name
    ]


MISTAKES = {
    "temperature": [("temperature", 0.7)],
    "hot": [("temperature", 1.4)],
    "top-k": [("top-k", 5)],
    "top-p": [("top-p", 0.9)],
    "min-p": [("min-p", 0.1)],
    "greedy": [("top-k", 1)],
    "temperature, top-p": [("temperature", 0.7), ("top-p", 0.8)],
    "temperature, top-k": [("temperature", 0.6), ("top-k", 5)],
    # A temperature of 0.5 alone explains these draws, too, but not half so well.
    "temperature, a late top-p": [("temperature", 0.6), ("top-p", 0.95)],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_ways_to_draw_are_told_apart(layout, model, name):
    wrong = model
    for kind, setting in MISTAKES[name]:
        wrong = applied(layout, wrong, kind, setting)
    draws = draw(layout, wrong, seed=7)
    assert not judge(draws, model, {}, reported=None, repetition=None).calibrated
    sources = {"": model} | {other: source(layout, other) for other in ("base model", "doubled BOS")}
    first = causes(draws, sources, reported=None)[0]
    assert first.kinds == tuple(kind for kind, _ in MISTAKES[name]) and first.fits, first
    assert blind_test(draws, wrong, count_left=False).p_value > 1e-3


@pytest.mark.parametrize("name", ["base model", "doubled BOS"])
@pytest.mark.parametrize("kind", [None, "temperature"])
def test_other_sources_are_told_apart(layout, model, name, kind):
    wrong = source(layout, name)
    draws = draw(layout, applied(layout, wrong, kind, 0.7) if kind else wrong, seed=8)
    assert not judge(draws, model, {}, reported=None, repetition=None).calibrated
    sources = {"": model} | {other: source(layout, other) for other in ("base model", "doubled BOS")}
    first = causes(draws, sources, reported=None)[0]
    assert first.kinds == ((name, kind) if kind else (name,)) and first.fits, first


def test_what_nothing_explains_has_no_fitting_cause(layout, model):
    draws = draw(layout, near(layout, seed=4, noise=0.4), seed=9)
    assert not judge(draws, model, {}, reported=None, repetition=None).calibrated
    found = causes(draws, {"": model, "base model": source(layout, "base model")}, reported=None)
    assert found and not any(cause.fits for cause in found)


def test_missing_stops(layout, model):
    draws = draw(layout, unstopped(layout, model), seed=10)
    assert causes(draws, {"": model}, reported=None)[0].kinds == ("stop token",)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_temperature_is_found(layout, model, temperature):
    draws = draw(layout, applied(layout, model, "temperature", temperature), seed=11, num=2000)
    found = maximum_likelihood(draws, model)
    assert abs(found.value - temperature) < 4 * found.error and found.error < 0.05


def test_mistakes_keep_what_leaves_the_trie(layout, model):
    for kind, setting in (("temperature", 2.0), ("top-k", 2), ("top-p", 0.5), ("min-p", 0.3)):
        changed = applied(layout, model, kind, setting)
        np.testing.assert_allclose(layout.sums(np.exp(changed.log_probs)) + np.exp(changed.log_left), 1, rtol=1e-12)
    changed = unstopped(layout, model)
    np.testing.assert_allclose(layout.sums(np.exp(changed.log_probs)) + np.exp(changed.log_left), 1, rtol=1e-12)


# By hand: after "1" come "1", "2" or the end.
HAND = trie_of(["1", "11", "12", "2"], [0.4, 0.2, 0.3, 0.1])


def test_cuts_by_hand():
    layout = Layout([HAND])
    probs = StepProbs(np.log(np.maximum(HAND.child_probs, 1e-12)), np.full(HAND.num_prefixes, math.log(1e-9)))

    def first(kind, setting):
        start, end = HAND.child_offsets[HAND.find([ord("1")])], HAND.child_offsets[HAND.find([ord("1")]) + 1]
        return np.exp(applied(layout, probs, kind, setting).log_probs[start:end])

    # The end 4/9, "1" 2/9, "2" 3/9; 3 in 1000 stays uncut.
    np.testing.assert_allclose(first("top-k", 2), [4 / 7, 0, 3 / 7], atol=0.004)
    np.testing.assert_allclose(first("top-p", 0.5), [4 / 7, 0, 3 / 7], atol=0.004)
    np.testing.assert_allclose(first("top-p", 0.4), [1, 0, 0], atol=0.004)
    np.testing.assert_allclose(first("min-p", 0.7), [4 / 7, 0, 3 / 7], atol=0.004)
    squares = np.array([16, 4, 9]) / 29
    np.testing.assert_allclose(first("temperature", 0.5), squares, rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "ended", "steps", "left"),
    [
        ("12", True, 3, None),
        ("1", True, 2, None),
        ("", True, 0, ""),
        ("13", True, 1, "1"),
        ("12x", True, 2, "12"),
        ("1", False, 1, "1"),  # cut before it ended
        ("1\0", True, 1, "1"),  # a stop token that the server shows is no clean end
        ("x", True, 0, ""),
    ],
)
def test_paths_of_answers(tokens, ended, steps, left):
    path = path_of(HAND, [ord(character) for character in tokens], ended=ended)
    assert len(path.children) == steps
    assert path.left == (None if left is None else HAND.find([ord(character) for character in left]))


def test_reported_log_probabilities():
    layout = Layout([HAND])
    reports = Reports(layout, lambda token: chr(token) if token else "<end>")
    path = path_of(HAND, [ord("1")], ended=True)
    reports.add(0, path, [("1", {"1": -0.1, "2": -2.3, "x": -9.0}), ("", {"": -0.5})])
    # Other tokens for the same text: nothing can be said about ours.
    reports.add(0, path_of(HAND, [ord("1"), ord("2")], ended=True), [("12", {"12": -1.0})])
    known = reports.log_probs[~np.isnan(reports.log_probs)]
    assert sorted(known.tolist()) == [-2.3, -0.5, -0.1]


def test_the_kl_of_log_probabilities(layout, model):
    draws = draw(layout, model, seed=12)
    assert abs(kl_to_server(draws, model, model.log_probs)) < 1e-9
    other = near(layout, seed=5, noise=0.5).log_probs
    # By hand, weighted by how often each prefix was reached; nothing is left out.
    p, q = np.exp(model.log_probs), np.exp(other)
    per_prefix = layout.sums(p * np.log(p / q))
    visits = layout.sums(draws.taken) + draws.left
    assert kl_to_server(draws, model, other) == pytest.approx(visits @ per_prefix / visits.sum(), abs=1e-3)
    # Of a token alone: against all others together.
    reported = np.where(np.arange(other.size) == 0, other, np.nan)
    one = p[0] * np.log(p[0] / q[0]) + (1 - p[0]) * np.log((1 - p[0]) / (1 - q[0]))
    assert kl_to_server(draws, model, reported) == pytest.approx(one, rel=1e-9)
    assert judge(draws, model, {}, reported=other, repetition=None).calibrated is False


def test_what_the_draws_do_not_tell_apart():
    """By hand: a top-k of 1 and a top-p below 0.6 leave the same answer; the other prompt explains nothing."""
    layout = Layout([trie_of(["1", "2", "3"], [0.6, 0.3, 0.1])])
    model = near(layout, seed=0, noise=0.0)
    draws = draw(layout, StepProbs(np.log([1, 1e-9, 1e-9, 1, 1, 1]), model.log_left), seed=15)
    found = causes(draws, {"": model, "another": near(layout, seed=1, noise=0.1)}, reported=None)
    assert {found[0].kinds, *(cause.kinds for cause in as_likely(found))} == {("top-k",), ("top-p",)}


def test_log_probabilities_tell_a_wrong_prompt_at_once(layout, model):
    """Twenty answers show nothing; what the server reports is the other prompt's, or the model's but for rounding."""
    rng = np.random.default_rng(14)

    def moved(probs, noise):
        scores = probs.log_probs + noise * rng.standard_normal(probs.log_probs.size)
        return applied(layout, StepProbs(scores, probs.log_left), "temperature", 1.0)

    wrong = moved(model, 0.1)
    variants = {"doubled BOS": wrong, "another": near(layout, seed=1, noise=0.3)}
    for source, name in ((wrong, "doubled BOS"), (model, "")):
        draws = draw(layout, source, seed=14, num=20)
        assert judge(draws, model, variants, reported=None, repetition=None).calibrated
        reported = moved(source, 0.01).log_probs
        verdict = judge(draws, model, variants, reported=reported, repetition=None)
        assert verdict.reported_variant == name and verdict.calibrated == (not name) and verdict.kl < MOST_KL
        if name:
            first = causes(draws, {"": model, **variants}, reported=reported)[0]
            assert first.name == name and first.fits


def test_repeated_answers_are_no_chance(layout, model):
    draws = draw(layout, model, seed=13)
    for repetition, calibrated in ((-3.0, True), (math.log(FALSE_ALARM) - 10, False)):
        assert judge(draws, model, {}, reported=None, repetition=repetition).calibrated is calibrated
