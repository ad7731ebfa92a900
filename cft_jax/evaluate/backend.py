"""What the suites ask of a model, whichever library runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from cft_jax.text.trie import Trie


@dataclass(frozen=True, eq=False)
class TrieRequest:
    """Asks for the model's probabilities along a trie.

    Attributes:
      prompt: token ids of the prompt.
      trie: the strings.
      prefixes: prefixes whose children are wanted, ascending, every prefix with all those above it; None for all.
    """

    prompt: tuple[int, ...]
    trie: Trie
    prefixes: Int[np.ndarray, "R"] | None


@dataclass(frozen=True, eq=False)
class TrieScores:
    """The model's answer to a `TrieRequest`.

    Attributes:
      child_log_probs: ln q(child | prompt, prefix) over the whole vocabulary at temperature 1, for every edge in the
        order of `trie.child_ids`; NaN at the prefixes not asked for.
      other_stop_log_probs: per value, ln of the probability that an answer ends right after the whole string by a stop
        token other than the trie's terminator; -inf where the model has no other. None where not computed.
    """

    child_log_probs: Float[np.ndarray, "K"]
    other_stop_log_probs: Float[np.ndarray, "N"] | None


@runtime_checkable
class Backend(Protocol):
    """A model that can be sampled from and asked for probabilities."""

    @property
    def fingerprint(self) -> str:
        """Identifies the weights: the same weights give the same text, in any process."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[list[str]]:
        """Completions of every prompt as text, without prompt and stop token.

        The draws of a prompt depend on its seed and tokens alone, not on the other prompts.
        """
        ...

    def score(self, requests: Sequence[TrieRequest]) -> list[TrieScores]:
        """Probabilities along tries, one answer per request."""
        ...
