"""Models run by `transformers` and torch as a backend of the suites: the same figures, from exported weights.

It is there to check exports and to compare speed, so it is plain: `generate` in batches, and strings scored by running
each once behind the cached prompt.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from cft_jax.checkpoints.generation_config import named_stop_ids
from cft_jax.checkpoints.peft_files import adapter_weights, is_adapter, read_adapter
from cft_jax.checkpoints.tensor_files import weight_files
from cft_jax.common import hub
from cft_jax.evaluate.backends.protocol import Prefixes, Tokens
from cft_jax.generate import Likelihood, TrieScore
from cft_jax.generate.stops import StopStrings
from cft_jax.text.paths import prefix_log_probs, string_log_probs
from cft_jax.text.trie import Trie

# Numbers of one forward pass's logits, which exist in float32 at once.
_LOGITS_AT_ONCE = 1 << 26
_SAMPLES_AT_ONCE = 250


class HfBackend:
    """Samples from and scores with a model of `transformers` in eval mode, with or without a PEFT adapter."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Sequence[int]) -> None:
        self._model, self._tokenizer, self.stop_ids = model, tokenizer, tuple(sorted(stop_ids))
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # Checkpoints bring sampling settings of their own (top_k, top_p, penalties), which would be applied in silence.
        model.generation_config = GenerationConfig(eos_token_id=list(self.stop_ids), pad_token_id=self.stop_ids[0])
        self.fingerprint = _fingerprint(model, self.stop_ids)

    @torch.inference_mode()
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
        strings = StopStrings(self._tokenizer, stop)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            torch.manual_seed(seed)
            texts: list[str] = []
            while len(texts) < num_samples:
                count = min(_SAMPLES_AT_ONCE, num_samples - len(texts))
                ids = torch.tensor([list(prompt)] * count, device=self._model.device)
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    stopping_criteria=_stopping(strings, len(prompt)),
                    **sampling,
                )
                texts += [strings.cut(self._text(row)) for row in out[:, len(prompt) :].tolist()]
            found.append(texts)
        return found

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Tokens], tries: Sequence[Trie], *, prefixes: Sequence[Prefixes] | None
    ) -> list[TrieScore]:
        parts = [None] * len(tries) if prefixes is None else prefixes
        return [self._score(*asked) for asked in zip(prompts, tries, parts, strict=True)]

    @torch.inference_mode()
    def next_token_log_probs(self, prompts: Sequence[Tokens]) -> Float32[np.ndarray, "P V"]:
        rows = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=self._model.device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0, -1]
            rows.append(torch.log_softmax(logits.float(), -1).cpu().numpy())
        return np.stack(rows)

    @torch.inference_mode()
    def log_likelihoods(self, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        answers = self._answers([[*context, *continuation] for context, continuation in requests])
        firsts = [len(context) - 1 for context, _ in requests]
        return [
            Likelihood(float(log_probs[first:].sum(dtype=np.float64)), bool(best[first:].all()))
            for first, (log_probs, best) in zip(firsts, answers, strict=True)
        ]

    @torch.inference_mode()
    def token_log_probs(self, rows: Sequence[Tokens]) -> list[Float32[np.ndarray, "_"]]:
        return [log_probs for log_probs, _ in self._answers(rows)]

    def _answers(self, rows: Sequence[Tokens]) -> list[tuple[Float32[np.ndarray, "_"], Bool[np.ndarray, "_"]]]:
        """Log-probabilities of every token but the first of each row, and whether it is the most probable one."""
        found = [(np.zeros(0, np.float32), np.zeros(0, bool)) for _ in rows]
        order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: -len(rows[i]))
        while order:
            length = len(rows[order[0]])
            count = max(_LOGITS_AT_ONCE // (length * self._model.config.get_text_config().vocab_size), 1)
            part, order = order[:count], order[count:]
            # Rows are filled up on the right, where causal attention lets nothing see it.
            tokens = torch.tensor([[*rows[i], *[0] * (length - len(rows[i]))] for i in part], device=self._model.device)
            logits = self._model(input_ids=tokens).logits
            for row, i in enumerate(part):
                scores, targets = logits[row, : len(rows[i]) - 1].float(), tokens[row, 1 : len(rows[i])]
                chosen = scores.gather(1, targets[:, None])[:, 0] - torch.logsumexp(scores, 1)
                found[i] = (chosen.cpu().numpy(), (scores.argmax(1) == targets).cpu().numpy())
        return found

    def _text(self, tokens: Tokens) -> str:
        end = next((index for index, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        text = self._tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _score(self, prompt: Tokens, trie: Trie, prefixes: Prefixes | None) -> TrieScore:
        chosen = np.arange(trie.num_prefixes) if prefixes is None else np.asarray(prefixes)
        others = [token for token in self.stop_ids if token != trie.terminator_id]
        is_leaf = np.zeros(trie.num_prefixes, dtype=bool)
        is_leaf[trie.leaf_prefix] = True
        children = np.full(trie.child_ids.size, np.nan)
        stops = np.full(trie.num_prefixes, np.nan)
        for prefix, log_probs in self._next_tokens(prompt, trie, chosen):
            entries = slice(trie.child_offsets[prefix], trie.child_offsets[prefix + 1])
            children[entries] = log_probs[torch.from_numpy(trie.child_ids[entries].astype(np.int64))].cpu().numpy()
            if is_leaf[prefix]:
                stops[prefix] = torch.logsumexp(log_probs[others], 0).item() if others else -np.inf
        whole = prefix_log_probs(trie, children)
        return TrieScore(children, whole, string_log_probs(trie, children), (whole + stops)[trie.leaf_prefix])

    def _next_tokens(self, prompt: Tokens, trie: Trie, chosen: Prefixes) -> Iterator[tuple[int, torch.Tensor]]:
        """The log-probabilities of the next token after every chosen prefix, float32[V]."""
        device = self._model.device
        start = self._model(input_ids=torch.tensor([list(prompt)], device=device), use_cache=True)
        yield 0, torch.log_softmax(start.logits[0, -1].float(), -1)
        numbers = _paths(trie, chosen)
        if not numbers.size:
            return
        rows = max(_LOGITS_AT_ONCE // (numbers.shape[1] * start.logits.shape[-1]), 1)
        done = {0}
        for first in range(0, numbers.shape[0], rows):
            part = numbers[first : first + rows]
            # Rows are filled up on the right, where causal attention lets nothing see it.
            tokens = np.where(part >= 0, trie.token[part], 0)
            cache = copy.deepcopy(start.past_key_values)
            cache.batch_repeat_interleave(part.shape[0])
            out = self._model(input_ids=torch.from_numpy(tokens.astype(np.int64)).to(device), past_key_values=cache)
            for row, depth in zip(*np.nonzero(part >= 0), strict=True):
                prefix = int(part[row, depth])
                if prefix not in done:
                    done.add(prefix)
                    yield prefix, torch.log_softmax(out.logits[row, depth].float(), -1)


def load_hf_model(path_or_id: str, *, dtype: str, revision: str, local_files_only: bool) -> tuple[Any, set[int]]:
    """A model of `transformers` in eval mode, from a checkpoint or a PEFT adapter in HF format, without its own code.

    Returns:
      The model, and the tokens that end a text by its files, those of an adapter among them.

    Raises:
      UserError: the checkpoint or its base is missing or has pickled weights alone, or the adapter is damaged.
    """
    directory, _ = hub.resolve(path_or_id, revision=revision, local_files_only=local_files_only)
    base = directory
    if is_adapter(directory) and not (directory / "config.json").is_file():
        adapter = read_adapter(str(directory), revision="", local_files_only=True)
        base, _ = hub.resolve(adapter.base, revision=adapter.revision, local_files_only=local_files_only)
    weight_files(base)  # in one line what torch would say in many, where there are pickles alone
    options = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype), **options)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if is_adapter(directory):
        adapter_weights(directory)
        model = PeftModel.from_pretrained(model, str(directory))
    return model.eval(), {*named_stop_ids(base), *named_stop_ids(directory)}


def _stopping(strings: StopStrings, start: int) -> StoppingCriteriaList:
    """Ends a row whose new tokens, those from `start` on, hold a stop string."""

    def reached(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([strings.reached(row) for row in ids[:, start:].tolist()], device=ids.device)

    criteria: Any = [reached] if strings.strings else []
    return StoppingCriteriaList(criteria)


def _paths(trie: Trie, chosen: Prefixes) -> Int[np.ndarray, "S T"]:
    """Prefixes along the path to every chosen one that no other continues, the empty one left out; -1 after the end."""
    continued = np.zeros(trie.num_prefixes, dtype=bool)
    continued[trie.parent[chosen[chosen > 0]]] = True
    ends = chosen[~continued[chosen] & (chosen > 0)]
    paths = np.full((ends.size, int(trie.depth[ends].max(initial=0))), -1)
    prefix = ends.copy()
    while (rows := np.flatnonzero(prefix > 0)).size:
        paths[rows, trie.depth[prefix[rows]] - 1] = prefix[rows]
        prefix[rows] = trie.parent[prefix[rows]]
    return paths


# Where a model lies and what wrote it, which change nothing.
_ORIGIN = ("_name_or_path", "transformers_version")
_ADAPTER = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def _fingerprint(model: Any, stop_ids: Sequence[int]) -> str:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}
    adapters = [{name: getattr(a, name) for name in _ADAPTER} for a in getattr(model, "peft_config", {}).values()]
    settings = json.dumps([config, adapters, stop_ids], sort_keys=True, default=str)
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
