"""The two models that judge answers in NoveltyBench, run by `transformers`: equivalence of answers, and their reward.

Weights come from safetensors alone and no checkpoint's own code is run.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from absl import logging
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cft_jax.common.errors import UserError

# Tokens of an answer that the classifier reads, as in NoveltyBench's own code (github.com/novelty-bench).
_ANSWER_TOKENS = 128
_EQUIVALENT = 1
_TOKENIZERS = ("tokenizer.json", "spm.model", "vocab.txt")
_Row = TypeVar("_Row")
_SHA256 = re.compile("[0-9a-f]{64}")


class Classifier:
    """The probability that two answers are equivalent: class 1 of a classifier of text pairs.

    Args:
      directory: in HF format.
      tokenizer: directory of the tokenizer, in HF format.
      dtype: of the weights.
      batch: pairs in one forward pass.

    Raises:
      UserError: the checkpoint cannot be loaded, or has not two classes.
    """

    def __init__(self, directory: Path, tokenizer: Path, *, dtype: str, batch: int) -> None:
        self._tokenizer, self._model = _load(directory, tokenizer, dtype)
        self._batch = batch
        if self._model.config.num_labels != 2:
            raise UserError(
                f"{directory} tells {self._model.config.num_labels} classes apart; a classifier of pairs has 2"
            )
        if None in (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id):
            raise UserError(
                f"the tokenizer in {tokenizer} has no tokens [CLS] and [SEP], which separate the two answers"
            )

    def __call__(self, answer: str, others: Sequence[str]) -> list[float]:
        """The probability of equivalence with each of the others, in order."""
        return _in_batches(self._probabilities, [self._pair(answer, other) for other in others], self._batch)

    def _pair(self, first: str, second: str) -> tuple[list[int], int]:
        """[CLS] first [SEP] second [SEP], and the length of its first part."""
        parts = [
            self._tokenizer.encode(text, truncation=True, max_length=_ANSWER_TOKENS, add_special_tokens=False)
            for text in (first, second)
        ]
        cls, sep = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        return [cls, *parts[0], sep, *parts[1], sep], len(parts[0]) + 2

    @torch.inference_mode()
    def _probabilities(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        ids, mask = _padded([tokens for tokens, _ in rows], self._tokenizer.pad_token_id or 0)
        kinds = torch.zeros_like(ids)
        for row, (tokens, first) in enumerate(rows):
            kinds[row, first : len(tokens)] = 1
        device = self._model.device
        logits = self._model(
            input_ids=ids.to(device), attention_mask=mask.to(device), token_type_ids=kinds.to(device)
        ).logits
        return torch.softmax(logits.float(), -1)[:, _EQUIVALENT].tolist()


class RewardModel:
    """A number for how good an answer to a prompt is: the only output of a classifier of conversations.

    Args:
      directory: in HF format, with a chat template.
      dtype: of the weights.
      batch: conversations in one forward pass.

    Raises:
      UserError: the checkpoint cannot be loaded, has several outputs or no chat template.
    """

    def __init__(self, directory: Path, *, dtype: str, batch: int) -> None:
        self._tokenizer, self._model = _load(directory, directory, dtype)
        self._batch = batch
        if self._model.config.num_labels != 1:
            raise UserError(f"{directory} has {self._model.config.num_labels} outputs; a reward model has 1")
        if self._tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer in {directory} has no chat template, by which the reward model reads answers"
            )
        pad = self._tokenizer.pad_token_id
        # The reward is read at the last token that is no padding, which `transformers` finds by this id.
        self._model.config.pad_token_id = self._tokenizer.eos_token_id if pad is None else pad
        self._longest = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)

    def __call__(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """The reward of each answer, in order."""
        return _in_batches(self._rewards, [self._conversation(prompt, answer) for answer in answers], self._batch)

    def _conversation(self, prompt: str, answer: str) -> list[int]:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        # The template writes the BOS itself. The paper's reference adds a second one, NoveltyBench's own code does not.
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        return self._tokenizer.encode(text, add_special_tokens=False)[: self._longest]

    @torch.inference_mode()
    def _rewards(self, rows: Sequence[list[int]]) -> list[float]:
        ids, mask = _padded(rows, self._model.config.pad_token_id)
        device = self._model.device
        return self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float().tolist()


def has_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint brings a tokenizer; that of NoveltyBench's classifier is published elsewhere."""
    return any((directory / name).is_file() for name in _TOKENIZERS)


def check_files(directory: Path, tokenizer: Path) -> None:
    """Refuses a judge that could not be loaded later.

    Raises:
      UserError: its weights are in a format that can run code, or its tokenizer needs a package that is absent.
    """
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds no .safetensors; other formats of weights can run code and are not loaded")
    spelt = (tokenizer / "spm.model").is_file() and not (tokenizer / "tokenizer.json").is_file()
    if spelt and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(f"the tokenizer in {tokenizer} needs sentencepiece: pip install -e '.[eval]'")


def checkpoint_identity(directory: Path) -> str:
    """Identifies a judge by the contents of all its weights, settings and tokenizer files."""
    logging.info("identifying %s", directory)
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors", ".model")):
        digest.update(f"{path.name} {_content_hash(path)}\n".encode())
    return digest.hexdigest()[:16]


def _content_hash(path: Path) -> str:
    """SHA-256 of a file; the hub's cache keeps large files under it, so that they need not be read."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(directory: Path, tokenizer: Path, dtype: str) -> tuple[Any, Any]:
    try:
        reader = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            str(directory),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the judge in {directory} cannot be loaded: {first}") from error
    return reader, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _in_batches(judge: Callable[[Sequence[_Row]], list[float]], rows: Sequence[_Row], batch: int) -> list[float]:
    return [number for start in range(0, len(rows), batch) for number in judge(rows[start : start + batch])]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64[R, T], padded on the right."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = 1
    return ids, mask
