"""Sampling from the model, and scoring whole output spaces with it."""

from cft_jax.generate.branches import Completion
from cft_jax.generate.engine import Sampler
from cft_jax.generate.sampling import SamplingSettings
from cft_jax.generate.text_scorer import Likelihood, TextScorer
from cft_jax.generate.trie_scorer import TrieScore, TrieScorer, score_trie

__all__ = [
    "Completion",
    "Likelihood",
    "Sampler",
    "SamplingSettings",
    "TextScorer",
    "TrieScore",
    "TrieScorer",
    "score_trie",
]
