"""Figures of the suites that sample no numbers; expected values from tests/golden, made by the reference."""

import math

import numpy as np
import pytest

from cft_jax.evaluate import metrics, parsing


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_mcq_figures(golden_rows):
    raw = {row["index"]: row["raw"] for row in golden_rows("parsing", "mcq")}
    distances = {"freq_a", "freq_b", "freq_c", "freq_d", "chi_square_statistic", "chi_square_pvalue"}
    distances |= {"tv_distance_from_uniform", "max_abs_deviation_from_uniform"}
    rates = {"parse_rate", "valid_correct_answer_rate", "unique_options_rate"}
    cases = golden_rows("parsing", "mcq_metrics")
    assert any(case["summary"]["num_parseable"] == 0 for case in cases)
    for case in cases:
        expected = dict(case["summary"])
        # Where the reference reports a perfect distance of nothing, ours has no figure.
        absent = set() if expected["num_parseable"] else distances
        absent |= set() if expected["num_samples"] else rates
        got = metrics.mcq_summary([parsing.parse_mcq(raw[index]) for index in case["indices"]])
        assert got == {name: close(value) for name, value in expected.items() if name not in absent}
        rows = [dict(row) for row in case["answer_frequencies"]]
        if not expected["num_parseable"]:
            rows = [{"answer_label": row["answer_label"], "count": 0} for row in rows]
        assert metrics.answer_frequencies(got) == rows


def test_open_random_counts(golden_rows):
    for case in golden_rows("parsing", "open_random_counts"):
        got = metrics.open_random_counts(case["outputs"])
        assert {name: got[name] for name in ("num_unique", "counts")} == {n: case[n] for n in ("num_unique", "counts")}
        assert got["unique_fraction"] == close(case["unique_fraction"])
        assert got["num_outputs"] == len(case["outputs"])


def test_open_random_entropy():
    # By hand: frequencies 1/2, 1/4, 1/4 have entropy 1.5 ln 2; the empty output is no answer.
    got = metrics.open_random_counts(["a", "a", "b", "c", ""])
    assert got["entropy"] == close(1.5 * math.log(2))
    assert "entropy" not in metrics.open_random_counts([""])


def test_top_p_sizes(golden_rows):
    cases = golden_rows("parsing", "top_p")
    assert len(metrics.TOP_P_THRESHOLDS) == 21
    for case in cases:
        probs = np.array(case["probs"], np.float32).astype(np.float64)
        assert list(metrics.top_p_sizes(probs, case["thresholds"])) == case["sizes_f64"], case["name"]
    assert tuple(cases[0]["thresholds"]) == metrics.TOP_P_THRESHOLDS


def test_novelty_rewards_and_equality(golden_rows):
    for case in golden_rows("noveltybench", "reward"):
        assert metrics.reward_score(case["raw"]) == case["score"]
    for case in golden_rows("noveltybench", "equality"):
        assert metrics.short_answers_equal(case["a"], case["b"]) is case["result"]


def test_novelty_partition(golden_rows):
    for case in golden_rows("noveltybench", "partition"):
        responses, scores = case["responses"], case["pair_scores"]
        # Equal texts have equal scores in the golden cases, so a text's first index stands for it.
        first = {text: index for index, text in reversed(list(enumerate(responses)))}

        def scorer(opener, candidates, scores=scores, first=first):
            return [scores[first[opener]][first[text]] for text in candidates]

        got = metrics.partition_answers(responses, scorer, threshold=case["threshold"])
        assert list(got.classes) == case["partition"]
        assert got.num_classifier_pairs == case["num_classifier_pairs"]
        assert got.num_classifier_calls == case["num_classifier_calls"]


def test_novelty_utility(golden_rows):
    for case in golden_rows("noveltybench", "partition_score"):
        arguments = (case["partition"], case["raw_rewards"])
        if case["error"]:
            with pytest.raises(ValueError, match="increasing order"):
                metrics.score_list(*arguments, patience=case["patience"])
            continue
        got = metrics.score_list(*arguments, patience=case["patience"])
        assert list(got.generation_scores) == case["generation_scores"]
        assert list(got.partition_scores) == case["partition_scores"]
        assert got.utility == close(case["utility"])


def test_novelty_summary(golden_rows):
    for case in golden_rows("noveltybench", "summary"):
        lists = [metrics.ListScore((), tuple(row["partition_scores"]), row["utility"]) for row in case["rows"]]
        got = metrics.noveltybench_summary(lists)
        assert got == {name: close(value) for name, value in case["summary"].items()}
