"""The paper's grid beside the full resolution, family by family.

For one prompt of every family (the first of the paper's selected test prompts, five decimals):

- KS: the Kolmogorov-Smirnov distance, max |F_student - F|, between a perfect student of the space and the
  distribution that the prompt asks for. A test of n draws at 5 % rejects at about 1.36 / sqrt(n): 0.043 for 1,000.
- H: entropy of the space in nats; exp(H) is its effective number of strings.
- branch: the expected share of a drawn string's steps, the terminator's included, at which more than one token has
  probability; the other steps teach a fixed continuation.

Then the time to make all targets of a batch of 32 drawn strings at full resolution, one prompt each.

    CFT_TOKENIZERS=/path/to/tokenizers python benchmarks/full_space.py

Takes about a minute on two cores; needs the tokenizers `qwen3` (digit by digit) and `llama3` (groups of three).
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from cft_jax.distributions import FAMILIES, PromptSpec, build_splits, number_space
from cft_jax.distributions.analytic_space import AnalyticSpace, analytic_space
from cft_jax.text.analytic_trie import AnalyticTrie, drawn_forest
from cft_jax.text.digits import digit_tokens
from cft_jax.text.number_grammar import NumberTokens
from cft_jax.text.tokenizer import load_tokenizer
from cft_jax.text.trie import Trie, build_trie

DECIMALS = 5
QUANTILE = 1e-6
NUM_DRAWS = 2000
TOKENIZERS = ("qwen3", "llama3")


def step_distance(distribution: Any, numbers: np.ndarray, cdf: np.ndarray) -> float:
    """Largest |G - F| of a step function G with values `cdf` at ascending `numbers` and the family's cdf F."""
    before = distribution.cdf(np.nextafter(numbers, -np.inf))
    after = distribution.cdf(numbers)
    return float(max(np.abs(cdf - after).max(), np.abs(np.append(0, cdf[:-1]) - before).max()))


def full_distance(space: AnalyticSpace) -> float:
    """`step_distance` of a full space, taken at 60,000 quantiles and around both ends."""
    quantiles = space.draw(np.concatenate([np.arange(1, 60_000) / 60_000, np.geomspace(1e-9, 1e-3, 200)]))
    ends = np.concatenate([space.first + np.arange(50), space.last - np.arange(50)])
    integers = np.unique(np.clip(np.concatenate([quantiles, ends]), space.first, space.last))
    below = space.interval_masses(np.full_like(integers, space.first), integers)
    upto = space.interval_masses(np.full_like(integers, space.first), integers + 1)
    numbers = space.numbers(integers)
    return float(
        max(
            np.abs(upto - space.distribution.cdf(numbers)).max(),
            np.abs(below - space.distribution.cdf(np.nextafter(numbers, -np.inf))).max(),
        )
    )


def branching_share(trie: Trie, leaf_probabilities: np.ndarray) -> float:
    """Expected share of branching steps of a string drawn from the leaves."""
    per_step = leaf_probabilities / (trie.depth[trie.leaf_prefix] + 1)
    running = np.append(0.0, np.bincount(trie.leaf_prefix, per_step, trie.num_prefixes).cumsum())
    weights = running[trie.subtree_end] - running[: trie.num_prefixes]
    possible = np.add.reduceat((trie.child_probs > 0).astype(np.int64), trie.child_offsets[:-1])
    return float(weights[possible > 1].sum())


def drawn_share(trie: AnalyticTrie) -> float:
    """`branching_share` of a full trie, from strings at evenly spaced quantiles."""
    drawn = trie.space.draw((np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS)
    return branching_share(drawn_forest([trie], [drawn]).trie(0), np.full(NUM_DRAWS, 1 / NUM_DRAWS))


def entropy(probabilities: np.ndarray) -> float:
    """In nats."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def row(spec: PromptSpec, tokenizers: dict[str, Any], tokens: dict[str, NumberTokens]) -> list[str]:
    """One line of the table."""
    distribution = FAMILIES[spec.family_id].frozen(spec.parameters)
    cells = [spec.family_id]
    distances, entropies, shares = [], [], []
    for max_bins in (1001, 16_384):
        grid = number_space(spec, num_decimals=DECIMALS, max_bins=max_bins)
        numbers = grid.integers() / 10.0**grid.num_decimals
        distances.append(step_distance(distribution, numbers, grid.probabilities.cumsum()))
        entropies.append(entropy(grid.probabilities))
        if max_bins == 1001:
            for name in TOKENIZERS:
                trie = build_trie(tokenizers[name], grid.listed(), tokens[name].terminator_id)
                shares.append(branching_share(trie, trie.leaf_probs))
    space = analytic_space(spec, num_decimals=DECIMALS, quantile=QUANTILE)
    distances.append(full_distance(space))
    entropies.append(space.entropy)
    shares += [drawn_share(AnalyticTrie(space, tokens[name])) for name in TOKENIZERS]
    cells += [f"{space.num_values:.3g}", *(f"{value:.1e}" for value in distances)]
    cells += [f"{value:.2f}" for value in entropies]
    return cells + [f"{100 * shares[index]:.0f} %" for index in (0, 2, 1, 3)]


def batch_milliseconds(specs: list[PromptSpec], tokens: NumberTokens) -> tuple[float, float]:
    """Median times to draw 32 strings and to make their targets, families in equal parts."""
    tries = [AnalyticTrie(analytic_space(spec, num_decimals=DECIMALS, quantile=QUANTILE), tokens) for spec in specs]
    generator = np.random.default_rng(0)
    sampling, targets = [], []
    for _ in range(40):
        chosen = [tries[index] for index in generator.choice(len(tries), 32, replace=False)]
        start = time.perf_counter()
        drawn = [trie.space.draw(generator.random(1)) for trie in chosen]
        middle = time.perf_counter()
        drawn_forest(chosen, drawn)
        sampling.append(middle - start)
        targets.append(time.perf_counter() - middle)
    return 1e3 * float(np.median(sampling)), 1e3 * float(np.median(targets))


def main() -> None:
    """Prints both tables."""
    directory = Path(os.environ["CFT_TOKENIZERS"])
    tokenizers = {n: load_tokenizer(str(directory / n), revision="main", local_files_only=True) for n in TOKENIZERS}
    tokens = {n: NumberTokens(digit_tokens(t), t.eos_token_id) for n, t in tokenizers.items()}
    splits = build_splits(selection="paper_selected")
    specs: dict[str, PromptSpec] = {}
    for spec in [*splits["test_unseen_params"], *splits["test_ood_family"]]:
        specs.setdefault(spec.family_id, spec)
    names = ["family", "strings", "KS 1001", "KS 16384", "KS full", "H 1001", "H 16384", "H full"]
    names += [f"branch {space} {name}" for name in TOKENIZERS for space in ("grid", "full")]
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))
    for spec in specs.values():
        print("| " + " | ".join(row(spec, tokenizers, tokens)) + " |")
    print()
    train = splits["train"]
    one_each = [spec for index, spec in enumerate(train) if index % (len(train) // 400) == 0]
    for name in TOKENIZERS:
        sampling, targets = batch_milliseconds(one_each, tokens[name])
        print(f"{name}: 32 strings drawn in {sampling:.1f} ms, their targets made in {targets:.1f} ms")


if __name__ == "__main__":
    main()
