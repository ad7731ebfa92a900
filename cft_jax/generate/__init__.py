"""Sampling from the model, and scoring whole output spaces with it."""

from cft_jax.generate.branches import Completion as Completion
from cft_jax.generate.engine import Sampler as Sampler
from cft_jax.generate.sampling import SamplingSettings as SamplingSettings
from cft_jax.generate.text_scorer import Likelihood as Likelihood
from cft_jax.generate.text_scorer import TextScorer as TextScorer
from cft_jax.generate.trie_scorer import TrieScore as TrieScore
from cft_jax.generate.trie_scorer import TrieScorer as TrieScorer
from cft_jax.generate.trie_scorer import score_trie as score_trie
