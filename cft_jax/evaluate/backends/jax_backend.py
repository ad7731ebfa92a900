"""The JAX model as a backend of the suites."""

from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import Float32, Int
from transformers import PreTrainedTokenizerBase

from cft_jax.checkpoints.fingerprint import fingerprint
from cft_jax.generate import Likelihood, Sampler, TextScorer, TrieScore, TrieScorer
from cft_jax.models.transformer import Transformer
from cft_jax.text.trie import Trie


class JaxBackend:
    """Samples from and scores with a model that does not change while this object lives.

    Args:
      model: the language model.
      tokenizer: of the model.
    """

    def __init__(self, model: Transformer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._sampler = Sampler(model, tokenizer)
        self.stop_ids = self._sampler.stop_ids
        lora = model.lora_spec
        adapters = None if lora is None else (lora.rank, lora.alpha, sorted(lora.targets))
        settings = (model.config, adapters, model.dtype.name, self.stop_ids)
        self._fingerprint = fingerprint(nnx.state(model, nnx.Param), *settings)
        self._scorer = TrieScorer(model, stop_ids=self.stop_ids)
        self._texts = TextScorer(model)

    @property
    def fingerprint(self) -> str:
        """Of all weights, adapters included, the architecture, and the tokens that end a text."""
        return self._fingerprint

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str] = (),
    ) -> list[list[str]]:
        """See `Backend.sample`."""
        return self._sampler.sample(
            prompts,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            seed=seeds,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
        )

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        tries: Sequence[Trie],
        *,
        prefixes: Sequence[Int[np.ndarray, "_"]] | None,
    ) -> list[TrieScore]:
        """See `Backend.score`."""
        return self._scorer.score(prompts, tries, prefixes=prefixes)

    def next_token_log_probs(self, prompts: Sequence[Sequence[int]]) -> Float32[np.ndarray, "P V"]:
        """See `Backend.next_token_log_probs`."""
        return self._texts.next_token_log_probs(prompts)

    def log_likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """See `Backend.log_likelihoods`; continuations of one context share its computation."""
        return self._texts.log_likelihoods(requests)

    def token_log_probs(self, rows: Sequence[Sequence[int]]) -> list[Float32[np.ndarray, "_"]]:
        """See `Backend.token_log_probs`."""
        return self._texts.token_log_probs(rows)
