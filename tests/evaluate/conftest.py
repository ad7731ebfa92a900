"""Golden rows of the evaluation (tests/golden/README.md says what every field is), and a model known exactly."""

import functools
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cft_jax.evaluate.exact_plan import PromptCodec
from cft_jax.generate import TrieScore
from cft_jax.text import paths
from cft_jax.text.digits import DigitTokens
from cft_jax.text.full_trie import FullTrie
from cft_jax.text.number_prefixes import NumberTokens
from cft_jax.text.trie import grow_forest, token_matrix

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@pytest.fixture(scope="session")
def golden_rows(golden: Path) -> Callable[..., list[dict[str, Any]]]:
    """Rows of `<name>.jsonl.gz`, of one kind if given, with non-finite numbers read back from their strings."""

    def read(name: str, kind: str | None = None) -> list[dict[str, Any]]:
        with gzip.open(golden / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        return [_numbers(row) for row in found if kind is None or row["kind"] == kind]

    return read


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


TERMINATOR = 0
VOCAB_SIZE = 256


NUMBERS = NumberTokens(
    DigitTokens(1, (np.array([ord(digit) for digit in "0123456789"], np.int32),), ord("-"), ord(".")), TERMINATOR
)


class CharacterModel:
    """A backend over single characters: a model known in closed form, which refuses what the real one refuses.

    With probability `off` the first token is a letter, which no number begins with; else it writes a number from the
    prompt's target, tilted towards small token ids by `tilt`.
    """

    def __init__(self, spaces: dict[tuple[int, ...], Any], *, off: float, tilt: float, fail_after: int = 10**9):
        self.spaces, self.off, self.tilt, self.fail_after = spaces, off, tilt, fail_after
        self.calls = 0
        self.next_log_probs = functools.cache(self._next_log_probs)

    @property
    def fingerprint(self) -> str:
        return f"off={self.off} tilt={self.tilt}"

    def _next_log_probs(self, prompt: tuple[int, ...], prefix: tuple[int, ...]) -> np.ndarray:
        probs = np.full(VOCAB_SIZE, 1e-12)
        text = "".join(map(chr, prefix))
        space = self.spaces[prompt]
        for value, p in zip(space.values, space.probabilities, strict=True):
            if value.startswith(text):
                token = ord(value[len(text)]) if len(value) > len(text) else TERMINATOR
                probs[token] += p * math.exp(-self.tilt * token)
        probs /= probs.sum()
        if not prefix:
            probs = probs * (1 - self.off)
            probs[ord("x")] += self.off
        if text.startswith("x"):
            probs = np.full(VOCAB_SIZE, 1e-12)
            probs[TERMINATOR] = 1
        return np.log(probs / probs.sum())

    def score(self, prompts, tries, *, prefixes):
        self.calls += 1
        if self.calls > self.fail_after:
            raise KeyboardInterrupt
        wanted = [None] * len(tries) if prefixes is None else prefixes
        return [self._score(tuple(prompt), *asked) for prompt, *asked in zip(prompts, tries, wanted, strict=True)]

    def _score(self, prompt, trie, wanted) -> TrieScore:
        scores = np.full(trie.child_ids.size, np.nan)
        prefixes = {0: ()}
        for prefix in range(trie.num_prefixes) if wanted is None else wanted:
            if prefix:
                # A prefix without those above it cannot be computed: the real backend has no cache for it either.
                prefixes[int(prefix)] = (*prefixes[int(trie.parent[prefix])], int(trie.token[prefix]))
            entries = slice(trie.child_offsets[prefix], trie.child_offsets[prefix + 1])
            scores[entries] = self.next_log_probs(prompt, prefixes[int(prefix)])[trie.child_ids[entries]]
        strings = paths.string_log_probs(trie, scores)
        return TrieScore(scores, paths.prefix_log_probs(trie, scores), strings, np.full(strings.size, -np.inf))

    def next_token_log_probs(self, prompts):
        return np.stack([self.next_log_probs(tuple(prompt), ()) for prompt in prompts]).astype(np.float32)

    def log_likelihoods(self, requests):
        raise NotImplementedError

    def token_log_probs(self, rows):
        raise NotImplementedError

    def sample(self, prompts, *, seeds, num_samples, max_new_tokens, temperature, top_p, stop=()):
        assert not stop and len(seeds) == len(prompts) and temperature == top_p == 1.0
        return [
            [self._draw(tuple(prompt), rng, max_new_tokens) for _ in range(num_samples)]
            for prompt, rng in zip(prompts, map(np.random.default_rng, seeds), strict=True)
        ]

    def _draw(self, prompt, rng, max_new_tokens) -> str:
        tokens: tuple[int, ...] = ()
        while len(tokens) < max_new_tokens:
            token = int(rng.choice(VOCAB_SIZE, p=np.exp(self.next_log_probs(prompt, tokens))))
            if token == TERMINATOR:
                break
            tokens = (*tokens, token)
        return "".join(map(chr, tokens))


def encode_characters(messages) -> list[int]:
    return [ord(character) for character in messages[-1]["content"]]


def character_trie(space):
    tokens, lengths = token_matrix([[ord(character) for character in value] for value in space.values])
    groups = np.zeros(lengths.size, np.int64)
    return grow_forest(tokens, lengths, groups, space.probabilities, terminator_id=TERMINATOR, describe=str).trie(0)


@pytest.fixture(scope="session")
def character_model() -> type[CharacterModel]:
    return CharacterModel


@pytest.fixture(scope="session")
def character_codec() -> PromptCodec:
    return PromptCodec(encode_characters, character_trie, lambda space: FullTrie(space, NUMBERS), "characters")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, write_hf, hf_config) -> Path:
    """A random Llama-shaped checkpoint in HF format with a tokenizer of its own: real code paths in seconds."""
    from cft_jax.text.scratch import train_tokenizer

    tokenizer = train_tokenizer(["Name a random city. Answer with nothing else.", "Question: A. B. C. D. 0123456789"])
    directory = tmp_path_factory.mktemp("small") / "model"
    config = hf_config(
        "llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=4096
    )
    write_hf(directory, config)
    tokenizer.save_pretrained(directory)
    return directory
