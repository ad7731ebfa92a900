"""Averages of a split, by hand."""

import pytest

from cft_jax.evaluate.suites.structured.aggregate import summarise_split


def record(group, *, weight=1.0, **sections):
    return {"split": "s", "task_id": "t", "group": group, "weight": weight, **sections}


def test_families_count_alike_and_gaps_are_counted():
    records = [
        record("a", exact={"kl": 1.0}),
        record("a", exact={"kl": 3.0}),
        record("a", exact={"kl": 5.0}),
        record("b", exact={"kl": 10.0}),
        record("b", exact={}),
        record("c", exact={}),
    ]
    split = summarise_split(records, 0)
    # Family means 3 and 10; c has no metric and does not count as zero.
    assert split["exact"] == {"kl": pytest.approx(6.5)}
    assert split["left_out"] == {"exact": {"kl": 2}}
    assert (split["num_prompts"], split["num_families"]) == (6, 3)
    assert split["families"]["a"]["exact"]["kl"] == pytest.approx(3.0)
    assert "exact" not in split["families"]["c"]
    assert "sampled" not in split and "path" not in split and "calibration" not in split


def test_prompt_weights_count_within_a_family():
    records = [record("a", weight=3.0, exact={"kl": 1.0}), record("a", exact={"kl": 5.0})]
    assert summarise_split(records, 0)["exact"]["kl"] == pytest.approx(2.0)


def test_medians_shrug_at_one_wild_prompt():
    records = [record("a", exact={"kl": float(value)}) for value in (1, 2, 3, 4, 1e9)]
    assert summarise_split(records, 0)["medians"]["exact"]["kl"] == 3.0
    # Family b's single prompt weighs as much as a's five together.
    assert summarise_split([*records, record("b", exact={"kl": 0.5})], 0)["medians"]["exact"]["kl"] == 0.5


def test_intervals_of_averages():
    records = [
        record("a", sampled={"mean_error": 1.0}, intervals={"mean_error": [0.0, 0.0, 0.3]}),
        record("a", sampled={"mean_error": 2.0}, intervals={"mean_error": [0.0, 0.0, 0.4]}),
        record("b", sampled={"mean_error": 0.5}, intervals={"mean_error": [0.0, 0.0, 1.0]}),
    ]
    split = summarise_split(records, 100)
    # Errors of the family means 0.25 and 1, of their average sqrt(0.25**2 + 1) / 2.
    half = 1.959963984540054 * (0.25**2 + 1) ** 0.5 / 2
    assert split["intervals"]["mean_error"] == [pytest.approx(max(1.0 - half, 0)), pytest.approx(1.0 + half)]
    assert split["sampled"]["num_samples"] == 100


def test_rejections():
    records = [
        record("a", tests={"ks_randomised_pvalue": 0.01}, paper_gof={"gof_test": "ks", "gof_pvalue": 0.5}),
        record("a", tests={"ks_randomised_pvalue": 0.20}, paper_gof={"gof_test": "chi_square", "gof_pvalue": 0.0}),
    ]
    records[0]["paper_gof"] |= {"anderson_statistic": 2.0, "anderson_critical_5pct": 0.7}
    assert summarise_split(records, 10)["tests"] == {
        "ks_randomised": {"num_prompts": 2, "rejected_at_5pct": 0.5},
        "paper_ks": {"num_prompts": 1, "rejected_at_5pct": 0.0},
        "paper_chi_square": {"num_prompts": 1, "rejected_at_5pct": 1.0},
        "paper_anderson": {"num_prompts": 1, "rejected_at_5pct": 1.0},
    }
