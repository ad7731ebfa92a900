"""The JAX model as a backend of the suites."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from transformers import PreTrainedTokenizerBase

from cft_jax.checkpoints.fingerprint import fingerprint
from cft_jax.generate import Sampler, TextScorer, TrieScorer
from cft_jax.models.transformer import Transformer


class JaxBackend:
    """Samples from and scores with a model that does not change while this object lives."""

    def __init__(self, model: Transformer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._sampler = Sampler(model, tokenizer)
        self.stop_ids = self._sampler.stop_ids
        self.max_length = None if model.source is None else model.source.max_length
        lora = model.lora_spec
        adapters = None if lora is None else (lora.rank, lora.alpha, sorted(lora.targets))
        settings = (model.config, adapters, model.dtype.name, self.stop_ids)
        self.fingerprint = fingerprint(nnx.state(model, nnx.Param), *settings)
        self.score = TrieScorer(model, stop_ids=self.stop_ids).score
        texts = TextScorer(model)
        self.next_token_log_probs = texts.next_token_log_probs
        self.log_likelihoods = texts.log_likelihoods
        self.token_log_probs = texts.token_log_probs

    def sample(self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], **sampling: Any) -> list[list[str]]:
        return self._sampler.sample(prompts, seed=seeds, **sampling)
