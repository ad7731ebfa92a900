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

from cft_jax.config import Config
from cft_jax.evaluate.backends.protocol import MeasuredModel
from cft_jax.evaluate.results import Results
from cft_jax.evaluate.suites.protocol import SuiteContext
from cft_jax.evaluate.suites.structured.plan import PromptCodec
from cft_jax.generate import Likelihood, TrieScore
from cft_jax.text import paths
from cft_jax.text.analytic_trie import AnalyticTrie
from cft_jax.text.digits import DigitTokens
from cft_jax.text.number_grammar import NumberTokens
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

    max_length = None

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
        raise AssertionError("no suite under test asks for this")

    def token_log_probs(self, rows):
        raise AssertionError("no suite under test asks for this")

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


class ScriptedModel:
    """A backend whose log-likelihoods and greedy texts are made of what it is asked; it fails after so many calls."""

    fingerprint, max_length = "scripted", None

    def __init__(self, *, log_prob, text, stop, fail_after=10**9):
        self.log_prob, self.text, self.stop = log_prob, text, stop
        self.calls, self.fail_after = 0, fail_after

    def _count(self):
        self.calls += 1
        if self.calls > self.fail_after:
            raise KeyboardInterrupt

    def log_likelihoods(self, requests):
        self._count()
        return [Likelihood(self.log_prob(request), False) for request in requests]

    def sample(self, prompts, *, seeds, num_samples, max_new_tokens, temperature, top_p, stop=()):
        self._count()
        assert temperature == 0 and num_samples == 1 and self.stop in stop and len(set(seeds)) == len(seeds)
        return [[self.text(prompt)] for prompt in prompts]

    def _unasked(self, *_, **__):
        raise AssertionError("the suite asks for nothing else")

    score = next_token_log_probs = token_log_probs = _unasked


@pytest.fixture(scope="session")
def scripted_model() -> type[ScriptedModel]:
    return ScriptedModel


@pytest.fixture(scope="session")
def run_suite() -> Callable[..., dict[str, Any]]:
    """Runs a suite's `run` on any backend into a directory; further keywords are fields of the configuration."""

    def start(run, backend, tokenizer, directory, name="it", /, **fields):
        results = Results(directory, name, write=True)
        return run(SuiteContext(Config(**fields), results, MeasuredModel(backend, tokenizer, name)))

    return start


@pytest.fixture(scope="session")
def character_model() -> type[CharacterModel]:
    return CharacterModel


@pytest.fixture(scope="session")
def character_codec() -> PromptCodec:
    return PromptCodec(
        encode_characters,
        character_trie,
        lambda space: AnalyticTrie(space, NUMBERS),
        lambda tokens: "".join(map(chr, tokens)),
        "characters",
    )


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


def letters_tokenizer(special):
    """A tokenizer of single bytes, with BERT's or a chat's special tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*special.values(), *(chr(code) for code in range(32, 127)), "[UNK]"]
    rust = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="[UNK]", **special)


def randomise(model, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5, generator=generator)
    return model


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A small random DeBERTa that tells pairs of texts apart, in HF format."""
    import transformers

    directory = tmp_path_factory.mktemp("classifier")
    tokenizer = letters_tokenizer({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        type_vocab_size=2, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, pooler_hidden_size=24, num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    randomise(transformers.DebertaV2ForSequenceClassification(config), 3).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    """A small random Gemma with one output, in HF format."""
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("reward")
    tokenizer = letters_tokenizer({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, num_labels=1, pad_token_id=tokenizer.pad_token_id, sliding_window=16,
    )  # fmt: skip
    model = randomise(transformers.Gemma2ForSequenceClassification(config), 5)
    with torch.no_grad():
        # Rewards of the published model lie around its thresholds, between -8 and -2.
        model.score.weight.mul_(-1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def novelty_prompts(tmp_path_factory) -> Path:
    """NoveltyBench-shaped prompts: three of one split, one of another."""
    file = tmp_path_factory.mktemp("novelty") / "curated.jsonl"
    rows = [
        {"id": f"c-{index}", "prompt": f"Tell a story about a {what}."}
        for index, what in enumerate(("fox", "cat", "bridge"))
    ]
    rows.append({"id": "w-0", "prompt": "Name a colour.", "split": "wildchat"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# Documents of very different length, one without any token, one of a single letter, one with characters of many bytes.
PALOMA = {
    "news/test/a.jsonl.gz": ["the cat sat on the mat " * 9, "", "x", "déjà vu ☕ twice"],
    "news/test/b.jsonl.gz": ["numbers 1 2 3 and no more"],
    "code/test/c.jsonl.gz": ["def f(x): return x + 1\n" * 5],
    "code/val/d.jsonl.gz": ["of another split"],
}


@pytest.fixture(scope="session")
def paloma_texts() -> dict[str, list[str]]:
    """The documents of every file of `paloma`."""
    return PALOMA


@pytest.fixture(scope="session")
def paloma(tmp_path_factory) -> Path:
    """A directory in PALOMA's layout."""
    root = tmp_path_factory.mktemp("paloma")
    for name, texts in PALOMA.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(root / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    return root


@pytest.fixture(scope="session")
def tiny_benchmarks(tmp_path_factory, golden_rows) -> Path:
    """TinyBenchmarks' five data sets, 100 rows each, from the golden rows."""
    from cft_jax.config.suites import RETENTION_TASKS

    root = tmp_path_factory.mktemp("tiny")
    rows = golden_rows("retention_examples")
    for name in RETENTION_TASKS:
        own = [row["row"] for row in rows if row["task_name"] == name]
        lines = [json.dumps(own[i % len(own)]) for i in range(100)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root
