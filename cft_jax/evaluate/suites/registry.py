"""The evaluation suites by name, a row each: all that the commands and the reports know of a suite."""

from cft_jax.distributions.splits import OOD, UNSEEN
from cft_jax.evaluate.suites import mcq, open_random, perplexity, questions
from cft_jax.evaluate.suites.noveltybench import suite as noveltybench
from cft_jax.evaluate.suites.protocol import Headline, Suite
from cft_jax.evaluate.suites.retention import suite as retention
from cft_jax.evaluate.suites.structured import suite as structured

SUITES: dict[str, Suite] = {
    structured.SUITE: Suite("Structured sampling", structured.check, structured.run, (
        Headline("KL, unseen parameters", ("splits", UNSEEN, "exact", "kl"), better=-1),
        Headline("W1, unseen parameters", ("splits", UNSEEN, "sampled", "wasserstein_1"), better=-1),
        Headline("KL, unseen families", ("splits", OOD, "exact", "kl"), better=-1),
        Headline("W1, unseen families", ("splits", OOD, "sampled", "wasserstein_1"), better=-1),
        Headline("valid answers, unseen parameters", ("splits", UNSEEN, "sampled", "valid_rate"), 1, is_share=True),
    )),
    open_random.SUITE: Suite("Open random", open_random.check, open_random.run, (
        Headline("unique answers", ("mean_num_unique",), better=1),
        Headline("unique fraction", ("mean_unique_fraction",), 1, is_share=True),
        Headline("entropy, nats", ("mean_entropy",), better=1),
    )),
    mcq.SUITE: Suite("Multiple choice", mcq.check, mcq.run, (
        Headline("total variation", ("tv_distance_from_uniform",), better=-1),
        Headline("parsed", ("parse_rate",), 1, is_share=True),
    )),
    noveltybench.SUITE: Suite("NoveltyBench", noveltybench.check, noveltybench.run, (
        Headline("distinct, curated", ("splits", "curated", "mean_distinct"), better=1),
        Headline("utility, curated", ("splits", "curated", "mean_utility"), better=1),
        Headline("distinct, WildChat", ("splits", "wildchat", "mean_distinct"), better=1),
        Headline("utility, WildChat", ("splits", "wildchat", "mean_utility"), better=1),
        Headline("distinct, all prompts", ("overall", "mean_distinct"), better=1),
        Headline("utility, all prompts", ("overall", "mean_utility"), better=1),
    ), noveltybench.needs_model),
    perplexity.SUITE: Suite("Perplexity", perplexity.check, perplexity.run, (
        Headline("perplexity", ("total", "paper", "perplexity"), better=-1),
        Headline("bits per byte", ("total", "covering", "bits_per_byte"), better=-1),
    )),
    questions.SUITE: Suite("Questions", questions.check, questions.run, (
        Headline("right answers, of the kept half", ("halves", "kept", "accuracy"), 1, is_share=True),
        Headline("right answers, of the others", ("halves", "others", "accuracy"), 1, is_share=True),
        Headline("probability of the right answer, others", ("halves", "others", "probability"), 1, is_share=True),
        Headline("texts, nats per token, others", ("halves", "others", "nats_per_token"), -1),
    )),
    # Beside these, the tasks of lm-eval that a configuration names.
    retention.SUITE: Suite("Retention", retention.check, retention.run, (
        Headline("TinyBenchmarks, mean gp-IRT", ("tinybenchmarks", "aggregate", "mean_gpirt"), 1, is_share=True),
        Headline("TinyBenchmarks, mean accuracy", ("tinybenchmarks", "aggregate", "mean_accuracy"), 1, is_share=True),
        Headline("GSM8K, strict", ("tinybenchmarks", "aggregate", "gsm8k_strict_accuracy"), 1, is_share=True),
    )),
}  # fmt: skip
