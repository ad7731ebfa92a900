"""Metrics of every suite: of sampled numbers (the paper's and sound ones), exact ones, and those of other answers."""

from cft_jax.evaluate.metrics.exact import as_numbers as as_numbers
from cft_jax.evaluate.metrics.exact import calibration_bins as calibration_bins
from cft_jax.evaluate.metrics.exact import exact_figures as exact_figures
from cft_jax.evaluate.metrics.exact import wasserstein_on_line as wasserstein_on_line
from cft_jax.evaluate.metrics.mcq import answer_frequencies as answer_frequencies
from cft_jax.evaluate.metrics.mcq import mcq_summary as mcq_summary
from cft_jax.evaluate.metrics.noveltybench import ListScore as ListScore
from cft_jax.evaluate.metrics.noveltybench import Partition as Partition
from cft_jax.evaluate.metrics.noveltybench import noveltybench_summary as noveltybench_summary
from cft_jax.evaluate.metrics.noveltybench import partition_answers as partition_answers
from cft_jax.evaluate.metrics.noveltybench import reward_score as reward_score
from cft_jax.evaluate.metrics.noveltybench import score_list as score_list
from cft_jax.evaluate.metrics.noveltybench import short_answers_equal as short_answers_equal
from cft_jax.evaluate.metrics.open_random import TOP_P_THRESHOLDS as TOP_P_THRESHOLDS
from cft_jax.evaluate.metrics.open_random import open_random_counts as open_random_counts
from cft_jax.evaluate.metrics.open_random import top_p_sizes as top_p_sizes
from cft_jax.evaluate.metrics.paper import goodness_of_fit as goodness_of_fit
from cft_jax.evaluate.metrics.paper import moment_errors as moment_errors
from cft_jax.evaluate.metrics.paper import wasserstein_1 as wasserstein_1
from cft_jax.evaluate.metrics.perplexity import Window as Window
from cft_jax.evaluate.metrics.perplexity import covering_windows as covering_windows
from cft_jax.evaluate.metrics.perplexity import sliding_windows as sliding_windows
