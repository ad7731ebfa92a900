"""Sampling from the model, and scoring whole output spaces with it."""

from cft_jax.generate.engine import Sampler
from cft_jax.generate.prefixes import Completion
from cft_jax.generate.sampling import SamplingSettings
from cft_jax.generate.text_scorer import Likelihood, LikelihoodScorer
from cft_jax.generate.trie_scorer import Scorer, TrieScore, score_trie

__all__ = [
    "Completion",
    "Likelihood",
    "LikelihoodScorer",
    "Sampler",
    "SamplingSettings",
    "Scorer",
    "TrieScore",
    "score_trie",
]
