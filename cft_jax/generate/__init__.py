"""Sampling from the model, and scoring whole output spaces with it."""

from cft_jax.generate.score import Scorer, TrieScore, score_trie

__all__ = ["Scorer", "TrieScore", "score_trie"]
