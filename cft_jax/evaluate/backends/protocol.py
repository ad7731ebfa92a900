"""What the suites ask of a model, whichever library runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int
from transformers import PreTrainedTokenizerBase

from cft_jax.generate import Likelihood, TrieScore
from cft_jax.text.trie import Trie

Tokens = Sequence[int]
Prefixes = Int[np.ndarray, "_"]


@runtime_checkable
class Backend(Protocol):
    """A model that can be sampled from and asked for probabilities.

    Attributes:
      fingerprint: identifies the model, its weights and all that decides its numbers: equal for the same model.
      max_length: the tokens of the longest text it is made for; None where its files do not say.
    """

    fingerprint: str
    max_length: int | None

    def sample(
        self,
        prompts: Sequence[Tokens],
        *,
        seeds: Sequence[int],
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str] = (),
    ) -> list[list[str]]:
        """Completions of every prompt as text, without prompt and stop token; they end before the first `stop`.

        The draws of a prompt depend on its seed and tokens alone, not on the other prompts.
        """
        ...

    def score(
        self, prompts: Sequence[Tokens], tries: Sequence[Trie], *, prefixes: Sequence[Prefixes] | None
    ) -> list[TrieScore]:
        """Probabilities along one trie per prompt, over the whole vocabulary at temperature 1.

        With `prefixes`, only at these prefixes of each trie, which come with all their ancestors.
        """
        ...

    def next_token_log_probs(self, prompts: Sequence[Tokens]) -> Float32[np.ndarray, "P V"]:
        """Log-probabilities of every token after each prompt, over the whole vocabulary at temperature 1, float32."""
        ...

    def log_likelihoods(self, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Of continuations, given as the token ids of a context, at least one, and of what follows it."""
        ...

    def token_log_probs(self, rows: Sequence[Tokens]) -> list[Float32[np.ndarray, "_"]]:
        """Of every token of a row but the first, given those before it: T - 1 numbers per row of T tokens."""
        ...


@dataclass(frozen=True)
class MeasuredModel:
    """A model that suites measure, its tokenizer, and its name, which results record as `checkpoint`."""

    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    name: str
