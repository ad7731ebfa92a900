"""Metrics of every suite: of sampled numbers (the paper's and sound ones), exact ones, and those of other answers."""

from cft_jax.evaluate.metrics.exact import as_numbers, calibration_bins, exact_figures, wasserstein_on_line
from cft_jax.evaluate.metrics.mcq import answer_frequencies, mcq_summary
from cft_jax.evaluate.metrics.noveltybench import (
    ListScore,
    Partition,
    noveltybench_summary,
    partition_answers,
    reward_score,
    score_list,
    short_answers_equal,
)
from cft_jax.evaluate.metrics.open_random import TOP_P_THRESHOLDS, open_random_counts, top_p_sizes
from cft_jax.evaluate.metrics.paper import goodness_of_fit, moment_errors, wasserstein_1
from cft_jax.evaluate.metrics.perplexity import Window, covering_windows, sliding_windows

__all__ = [
    "TOP_P_THRESHOLDS",
    "ListScore",
    "Partition",
    "Window",
    "answer_frequencies",
    "as_numbers",
    "calibration_bins",
    "covering_windows",
    "exact_figures",
    "goodness_of_fit",
    "mcq_summary",
    "moment_errors",
    "noveltybench_summary",
    "open_random_counts",
    "partition_answers",
    "reward_score",
    "score_list",
    "short_answers_equal",
    "sliding_windows",
    "top_p_sizes",
    "wasserstein_1",
    "wasserstein_on_line",
]
