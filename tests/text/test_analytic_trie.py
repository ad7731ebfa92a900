"""The analytic trie against the listed one, and against the probabilities of its own strings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cft_jax.common.errors import UserError
from cft_jax.distributions import FAMILIES, OutputSpace, PromptSpec, build_splits
from cft_jax.distributions.analytic_space import analytic_space
from cft_jax.text.analytic_trie import AnalyticTrie, drawn_forest
from cft_jax.text.digits import DigitTokens, digit_tokens
from cft_jax.text.number_grammar import NumberGrammar, NumberState, NumberTokens
from cft_jax.text.tokenizer import load_tokenizer
from cft_jax.text.trie import CUT, build_trie

NO_DRAWS = np.zeros(0, dtype=np.int64)
EVERYTHING = 10**7


def made_up_tokens(group):
    """Digits as a tokenizer could number them, ids in no natural order."""
    size = sum(10**w for w in range(1, group + 1)) + 3
    ids = np.random.default_rng(5).permutation(size * 2)[:size].astype(np.int32)
    bounds = np.cumsum([10**w for w in range(1, group + 1)])
    runs = tuple(np.split(ids[:-3], bounds[:-1]))
    return NumberTokens(DigitTokens(group, runs, int(ids[-3]), int(ids[-2])), int(ids[-1]))


TOKENS = {group: made_up_tokens(group) for group in (1, 3)}


def spec_of(family_id, **parameters):
    return PromptSpec("train", family_id, "x", parameters, "")


def middle_specs():
    found = {}
    for specs in build_splits().values():
        for spec in specs:
            found.setdefault(spec.family_id, []).append(spec)
    return {family_id: specs[len(specs) // 2] for family_id, specs in found.items()}


SPECS = middle_specs()
# Whole parts of several groups, both signs, spaces on one side of zero, and zero at the border.
WIDE = {
    "gaussian-400": (spec_of("gaussian", mu=150.0, sigma=400.0), 1),
    "uniform-below-zero": (spec_of("uniform", a=-1234.5, b=-87.0), 1),
    "uniform-above-thousand": (spec_of("uniform", a=995.0, b=12_003.0), 0),
    "uniform-just-negative": (spec_of("uniform", a=-0.3, b=0.0), 2),
    "uniform-one-string": (spec_of("uniform", a=0.113, b=0.117), 1),
    "uniform-four-decimals": (spec_of("uniform", a=-0.05, b=1.02), 4),
    "uniform-no-decimals": (spec_of("uniform", a=-30.0, b=20_000.0), 0),
    "binomial-5000": (spec_of("binomial", n=5000, p=0.9), 5),
    "skellam": (spec_of("skellam", mu1=500.0, mu2=400.0), 5),
}
CASES = {**{family_id: (spec, 1) for family_id, spec in SPECS.items()}, **WIDE}
CASES["uniform"] = (SPECS["uniform"], 2)
CASES["truncnorm"] = (SPECS["truncnorm"], 2)


def intervals(trie, prefix):
    """The strings that begin with a prefix as disjoint intervals of k: starts, stops (exclusive), probabilities."""
    state = NumberState.empty(np.zeros(1, dtype=np.int64))
    for slot in trie.tokens.slots(np.array(prefix)):
        state = state.extended(np.array([slot]), trie.tokens)
    _, start, stop = NumberGrammar(trie.tokens, [trie.space]).intervals(state)
    start, stop = np.sort(start), np.sort(stop)
    joins = start[1:] == stop[:-1]
    start, stop = start[np.append(True, ~joins)], stop[np.append(~joins, True)]
    return start, stop, trie.space.interval_masses(start, stop)


def exits(trie):
    """The children that end a string or leave the trie, the prefixes they follow, and the probabilities below."""
    children = np.flatnonzero(trie.child_prefix < 0)
    prefix = np.searchsorted(trie.child_offsets, children, side="right") - 1
    return children, prefix, trie.reach[prefix] * trie.child_probs[children]


def naive_masses(spec, space):
    """The definition, string by string; see the tests of full_space."""
    distribution = FAMILIES[spec.family_id].frozen(spec.parameters)
    integers = np.arange(space.first, space.last + 1)
    if FAMILIES[spec.family_id].integer_only:
        masses = distribution.pmf(integers)
        masses[0] += distribution.cdf(space.first - 1)
        masses[-1] += distribution.sf(space.last)
        return integers, masses
    scale = 10.0**space.num_decimals
    edges = np.concatenate([[-np.inf], (integers[1:] - 0.5) / scale, [np.inf]])
    cdf, sf = distribution.cdf(edges), distribution.sf(edges)
    below = edges[1:] <= distribution.median()
    return integers, np.where(below, np.diff(cdf), -np.diff(sf))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3", "gpt_oss"])
def test_equals_the_listed_trie_for_every_family(tokenizers_dir, name):
    tokenizer = load_tokenizer(str(tokenizers_dir / name), revision="main", local_files_only=True)
    terminator_id = tokenizer.eos_token_id
    tokens = NumberTokens(digit_tokens(tokenizer), terminator_id)
    assert set(FAMILIES) <= set(CASES)
    for case, (spec, num_decimals) in CASES.items():
        space = analytic_space(spec, num_decimals=num_decimals, quantile=1e-3 if case == "cauchy" else 1e-5)
        integers, masses = naive_masses(spec, space)
        assert integers.size < 40_000, case
        listed = build_trie(tokenizer, OutputSpace(tuple(space.strings(integers)), masses), terminator_id)
        analytic = AnalyticTrie(space, tokens).expand(EVERYTHING, 100, integers)
        assert_same_trie(analytic.trie, listed, case)
        assert analytic.exact.all()
        # By definition, from the listed strings: Σ p(s) / T(s) over the strings below.
        steps = listed.depth[listed.leaf_prefix] + 1
        at_leaf = np.bincount(listed.leaf_prefix, masses / steps, minlength=listed.num_prefixes)
        running = np.append(0, at_leaf.cumsum())
        expected = running[listed.subtree_end] - running[: listed.num_prefixes]
        np.testing.assert_allclose(analytic.mean_weights, expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(analytic.sequence_weights, analytic.trie.reach)


def assert_same_trie(analytic, listed, case):
    for array in ("token", "parent", "depth", "subtree_end", "child_offsets", "child_ids", "child_prefix"):
        np.testing.assert_array_equal(getattr(analytic, array), getattr(listed, array), err_msg=f"{case} {array}")
    np.testing.assert_array_equal(analytic.leaf_prefix, listed.leaf_prefix, err_msg=case)
    np.testing.assert_allclose(analytic.leaf_probs, listed.leaf_probs, rtol=0, atol=1e-12, err_msg=case)
    np.testing.assert_allclose(analytic.reach, listed.reach, rtol=0, atol=1e-12, err_msg=case)
    np.testing.assert_allclose(joint(analytic), joint(listed), rtol=0, atol=1e-12, err_msg=case)


def joint(trie):
    return trie.child_probs * np.repeat(trie.reach, np.diff(trie.child_offsets))


def test_children_by_hand():
    # 8.5 to 12.1 with one decimal: "8.5" ... "12.1"; masses of half a step at both ends.
    space = analytic_space(spec_of("uniform", a=8.5, b=12.1), num_decimals=1, quantile=1e-6)
    numbers = TOKENS[3].numbers
    trie = AnalyticTrie(space, TOKENS[3])
    eight, nine, ten, eleven, twelve = (
        int(token) for token in (*numbers.runs[0][8:10], numbers.runs[1][10], numbers.runs[1][11], numbers.runs[1][12])
    )
    found = dict(zip(*(column.tolist() for column in trie.children(())), strict=True))
    # In units of the width 3.6: 8.5 to 8.95, 8.95 to 9.95, ..., 11.95 to 12.1.
    expected = {eight: 0.45, nine: 1.0, ten: 1.0, eleven: 1.0, twelve: 0.15}
    assert {token: p * 3.6 for token, p in found.items()} == pytest.approx(expected, abs=1e-12)
    ids, probabilities = trie.children((ten,))
    assert ids.tolist() == [numbers.point] and probabilities.tolist() == [1.0]
    found = dict(zip(*(column.tolist() for column in trie.children((twelve, numbers.point))), strict=True))
    # "12.0" from 11.95 to 12.05, "12.1" from 12.05 to the bound.
    assert found == pytest.approx({int(numbers.runs[0][0]): 2 / 3, int(numbers.runs[0][1]): 1 / 3}, abs=1e-12)
    ids, probabilities = trie.children((twelve, numbers.point, int(numbers.runs[0][1])))
    assert ids.tolist() == [TOKENS[3].terminator_id] and probabilities.tolist() == [1.0]


def test_three_digits_may_end_the_whole_part_or_go_on():
    # Integers 0 to 12,399, equally probable but for the ends.
    space = analytic_space(spec_of("uniform", a=-0.5, b=12_399.5), num_decimals=0, quantile=1e-6)
    numbers = TOKENS[3].numbers
    trie = AnalyticTrie(space, TOKENS[3])
    ids, probabilities = trie.children((int(numbers.runs[2][123]),))
    mass = dict(zip(ids.tolist(), probabilities * 111, strict=True))
    # "123" itself, "1230" ... "1239", "12300" ... "12399": 111 strings.
    assert mass.pop(TOKENS[3].terminator_id) == pytest.approx(1)
    assert mass == pytest.approx(dict.fromkeys([*numbers.runs[0].tolist(), *numbers.runs[1].tolist()], 1.0))
    # One digit ends the number.
    assert trie.children((int(numbers.runs[0][7]),))[0].tolist() == [TOKENS[3].terminator_id]
    starts, stops, _ = intervals(trie, [int(numbers.runs[2][123])])
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == [(123, 124), (1230, 1240), (12300, 12400)]


@pytest.mark.parametrize("group", [1, 3])
def test_there_is_no_negative_zero(group):
    space = analytic_space(spec_of("gaussian", mu=0.0, sigma=0.05), num_decimals=2, quantile=1e-6)
    trie, numbers = AnalyticTrie(space, TOKENS[group]), TOKENS[group].numbers
    zero_point = [int(numbers.runs[0][0]), numbers.point]
    below = intervals(trie, [numbers.minus, *zero_point])
    assert below[1].tolist() == [0] and below[2].sum() == pytest.approx(0.5 - 0.0398278, abs=1e-6)  # Φ(0.1) - ½
    width = 1 if group == 1 else 2
    with pytest.raises(KeyError):
        trie.children([numbers.minus, *zero_point, *[int(numbers.runs[width - 1][0])] * (2 // width)])
    assert intervals(trie, [*zero_point, *[int(numbers.runs[width - 1][0])] * (2 // width)])[:2] == (0, 1)


@settings(max_examples=60, deadline=None)
@given(
    family_id=st.sampled_from(sorted(SPECS)),
    group=st.sampled_from([1, 3]),
    num_decimals=st.integers(0, 10),
    uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8),
)
def test_paths_multiply_to_the_probability_of_the_string(family_id, group, num_decimals, uniforms):
    space = analytic_space(SPECS[family_id], num_decimals=num_decimals, quantile=1e-6)
    drawn = space.draw(np.array(uniforms))
    trie = drawn_forest([AnalyticTrie(space, TOKENS[group])], [drawn]).trie(0)
    sums = np.add.reduceat(trie.child_probs, trie.child_offsets[:-1])
    np.testing.assert_allclose(sums[trie.reach > 0], 1, rtol=0, atol=1e-12)
    for begin, end in zip(trie.child_offsets[:-1], trie.child_offsets[1:], strict=True):
        assert (np.diff(trie.child_ids[begin:end]) > 0).all()
    product, ended = np.ones(trie.num_prefixes), np.zeros(trie.num_prefixes)
    for entry in np.flatnonzero(trie.child_prefix != CUT):
        parent = np.searchsorted(trie.child_offsets, entry, side="right") - 1
        into, child = (ended, parent) if trie.child_prefix[entry] == -1 else (product, trie.child_prefix[entry])
        into[child] = product[parent] * trie.child_probs[entry]
    expected = space.interval_masses(drawn, drawn + 1)
    np.testing.assert_allclose(trie.leaf_probs, expected, rtol=1e-12)
    np.testing.assert_allclose(ended[trie.leaf_prefix], expected, rtol=1e-7, atol=1e-13)


def test_tries_of_a_batch_equal_those_of_each_prompt():
    generator = np.random.default_rng(2)
    for group in (1, 3):
        tries = [AnalyticTrie(analytic_space(s, num_decimals=5, quantile=1e-6), TOKENS[group]) for s in SPECS.values()]
        drawn = [trie.space.draw(generator.random(1 + index % 3)) for index, trie in enumerate(tries)]
        forest = drawn_forest(tries, drawn)
        assert len(forest) == len(tries)
        for index, (trie, integers) in enumerate(zip(tries, drawn, strict=True)):
            together, alone = forest.trie(index), drawn_forest([trie], [integers]).trie(0)
            for name, array in vars(alone).items():
                np.testing.assert_array_equal(getattr(together, name), array, err_msg=name)
            tokens, lengths = trie.encode(integers)
            for row, length, leaf in zip(tokens, lengths, together.leaf_prefix, strict=True):
                assert together.find(row[:length].tolist()) == leaf
                for depth in range(length + 1):
                    prefix = row[:depth].tolist()
                    ids, probabilities = trie.children(prefix)
                    np.testing.assert_array_equal(together.children(prefix)[0], ids)
                    np.testing.assert_allclose(together.children(prefix)[1], probabilities, rtol=1e-14)


def test_repeated_draws_share_their_prefixes():
    trie = AnalyticTrie(analytic_space(SPECS["poisson"], num_decimals=5, quantile=1e-6), TOKENS[1])
    drawn = np.array([3, 11, 3, 1])
    found = drawn_forest([trie], [drawn]).trie(0)
    # By hand: "", "1", "11", "3".
    assert found.num_prefixes == 4
    assert found.depth[found.leaf_prefix].tolist() == [1, 2, 1, 1]
    assert found.leaf_prefix[0] == found.leaf_prefix[2]
    ends = found.child_prefix == -1
    assert ends.sum() == 3 and set(found.child_ids[ends].tolist()) == {TOKENS[1].terminator_id}


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("budget", [1, 2, 17, 300])
def test_expansion_takes_the_most_probable_prefixes(group, budget):
    trie = AnalyticTrie(analytic_space(SPECS["lognormal"], num_decimals=2, quantile=1e-4), TOKENS[group])
    whole = trie.expand(EVERYTHING, 100, NO_DRAWS).trie
    part = trie.expand(budget, 100, NO_DRAWS)
    assert part.trie.num_prefixes == budget and part.exact.all()
    least = np.sort(whole.reach)[-budget]
    assert part.trie.reach.min() == pytest.approx(least, rel=1e-9)
    assert exits(part.trie)[2].sum() == pytest.approx(1, abs=1e-12)


def test_expansion_to_a_depth_holds_all_intervals_of_that_depth():
    trie = AnalyticTrie(analytic_space(SPECS["gumbel"], num_decimals=5, quantile=1e-6), TOKENS[1])
    part = trie.expand(EVERYTHING, 3, NO_DRAWS).trie
    children, parents, masses = exits(part)
    assert (part.child_prefix[children] == CUT).all() and (part.depth[parents] == 3).all()
    assert masses.sum() == pytest.approx(1, abs=1e-12)
    total = 0
    for entry, parent, expected in zip(children, parents, masses, strict=True):
        prefix = [int(part.child_ids[entry])]
        while parent > 0:
            prefix.insert(0, int(part.token[parent]))
            parent = part.parent[parent]
        starts, stops, mass = intervals(trie, prefix)
        assert mass.sum() == pytest.approx(expected, rel=1e-9, abs=1e-15)
        total += (stops - starts).sum()
    assert total == trie.space.num_values


@pytest.mark.parametrize("group", [1, 3])
def test_draws_below_an_expansion_are_unbiased(group):
    # The mean of the weights over all strings, each with its probability, is the exact objective's weights.
    trie = AnalyticTrie(analytic_space(SPECS["exponential"], num_decimals=1, quantile=1e-4), TOKENS[group])
    integers = np.arange(trie.space.first, trie.space.last + 1)
    masses = trie.space.interval_masses(integers, integers + 1)
    whole = trie.expand(EVERYTHING, 100, NO_DRAWS)
    strings = [row[:n].tolist() for row, n in zip(*trie.encode(integers), strict=True)]
    expected = dict(zip(paths_of(whole.trie), whole.mean_weights, strict=True))
    reach = dict(zip(paths_of(whole.trie), whole.sequence_weights, strict=True))
    budget = whole.trie.num_prefixes // 3
    mean, passing = dict.fromkeys(expected, 0.0), dict.fromkeys(expected, 0.0)
    for integer, mass in zip(integers, masses, strict=True):
        part = trie.expand(budget, 100, np.array([integer]))
        assert part.exact.sum() == budget
        for path, weight, times in zip(paths_of(part.trie), part.mean_weights, part.sequence_weights, strict=True):
            mean[path] += mass * weight
            passing[path] += mass * times
    assert mean == pytest.approx(expected, abs=1e-12)
    assert passing == pytest.approx(reach, abs=1e-12)
    assert len(strings) < whole.trie.num_prefixes


def paths_of(trie):
    paths = [()]
    for prefix in range(1, trie.num_prefixes):
        paths.append((*paths[trie.parent[prefix]], int(trie.token[prefix])))
    return paths


def test_weights_of_several_draws_are_their_mean():
    trie = AnalyticTrie(analytic_space(SPECS["gaussian"], num_decimals=5, quantile=1e-6), TOKENS[1])
    drawn = trie.space.draw(np.random.default_rng(0).random(50))
    part = trie.expand(40, 100, np.concatenate([drawn, drawn[:1]]))
    below = ~part.exact
    assert below.any() and part.exact.sum() == 40
    leaf = part.trie.leaf_prefix[0]
    steps = part.trie.depth[leaf] + 1
    assert part.sequence_weights[leaf] == pytest.approx(2 / 51)
    assert part.mean_weights[leaf] == pytest.approx(2 / 51 / steps)


def test_prefixes_that_begin_no_string_are_key_errors():
    trie = AnalyticTrie(analytic_space(SPECS["beta"], num_decimals=5, quantile=1e-6), TOKENS[3])
    numbers = TOKENS[3].numbers
    zero = int(numbers.runs[0][0])
    for prefix in ([numbers.minus], [numbers.point], [zero, zero], [zero, TOKENS[3].terminator_id], [-5]):
        with pytest.raises(KeyError):
            trie.children(prefix)


def test_terminator_among_the_digits_is_refused():
    with pytest.raises(UserError, match=r"config\.data\.terminator"):
        NumberTokens(TOKENS[1].numbers, TOKENS[1].numbers.point)


def test_prefix_of_no_probability_has_children_of_none():
    # Below the smallest double: the tail of a very narrow Gaussian inside a truncation.
    spec = spec_of("truncnorm", mu=0.0, sigma=0.01, lower=-1.0, upper=1.0)
    trie, numbers = AnalyticTrie(analytic_space(spec, num_decimals=2, quantile=1e-6), TOKENS[1]), TOKENS[1].numbers
    prefix = [int(numbers.runs[0][0]), numbers.point, int(numbers.runs[0][9])]
    ids, probabilities = trie.children(prefix)
    assert ids.size == 10 and not probabilities.any()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", ["gaussian-400", "uniform-four-decimals", "skellam", "binomial-5000"])
def test_numbers_below_children(name, group):
    spec, decimals = CASES[name]
    space = analytic_space(spec, num_decimals=decimals, quantile=1e-6)
    full = AnalyticTrie(space, TOKENS[group])
    trie = full.expand(60, 20, NO_DRAWS).trie
    parents = np.repeat(np.arange(trie.num_prefixes), np.diff(trie.child_offsets))
    cut = np.flatnonzero(trie.child_prefix < 0)
    numbers = full.child_numbers(trie, cut)
    # The cut children and the terminators share out all strings.
    integers, masses = naive_masses(spec, space)
    mean = (integers / 10.0**space.num_decimals) @ masses
    got = numbers @ (trie.reach[parents[cut]] * trie.child_probs[cut])
    assert got == pytest.approx(mean, abs=1e-3 * (space.upper_bound - space.lower_bound))
    tokens = {0: ()}
    for prefix in range(1, trie.num_prefixes):
        tokens[prefix] = (*tokens[int(trie.parent[prefix])], int(trie.token[prefix]))
    for place in np.random.default_rng(1).choice(cut.size, 40):
        child = int(trie.child_ids[cut[place]])
        if child == trie.terminator_id:
            continue
        starts, stops, weights = intervals(full, [*tokens[int(parents[cut[place]])], child])
        if weights.sum() > 0:
            expected = np.average((starts + stops - 1) / 2, weights=weights) / 10.0**space.num_decimals
            assert numbers[place] == pytest.approx(expected, rel=1e-9, abs=1e-9)
