"""The two models that judge answers in NoveltyBench, run by `transformers`: equivalence of answers, and their reward.

Weights come from safetensors alone and no checkpoint's own code is run.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from absl import logging
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cft_jax.common.errors import UserError

# Tokens of an answer that the classifier reads, as in NoveltyBench's own code (github.com/novelty-bench).
_ANSWER_TOKENS = 128
_EQUIVALENT = 1
_SHA256 = re.compile("[0-9a-f]{64}")
# The inputs of a model for one text, by name.
_Row = dict[str, list[int]]


class _Judge:
    """A classifier of texts.

    Args:
      directory: in HF format.
      tokenizer: directory of the tokenizer, in HF format.
      dtype: of the weights.
      batch: texts in one forward pass.

    Raises:
      UserError: the checkpoint cannot be loaded, or is of another kind.
    """

    _kind: str
    _num_outputs: int

    def __init__(self, directory: Path, tokenizer: Path, *, dtype: str, batch: int) -> None:
        local: Any = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer), **local)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                str(directory), dtype=getattr(torch, dtype), use_safetensors=True, **local
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the judge in {directory} cannot be loaded: {first}") from error
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._batch = batch
        found = self._model.config.num_labels
        if found != self._num_outputs:
            raise UserError(f"{directory} has {found} outputs; {self._kind} has {self._num_outputs}")

    @torch.inference_mode()
    def _numbers(self, rows: Sequence[_Row], pad: int, read: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        """What `read` makes of the float32 logits [R, C] of some rows at a time, padded on the right."""
        found = []
        for start in range(0, len(rows), self._batch):
            chunk = rows[start : start + self._batch]
            inputs = {}
            for name in chunk[0]:
                own = [torch.tensor(row[name], dtype=torch.int64) for row in chunk]
                fill = pad if name == "input_ids" else 0
                inputs[name] = pad_sequence(own, batch_first=True, padding_value=fill).to(self._model.device)
            found += read(self._model(**inputs).logits.float()).tolist()
        return found


class Classifier(_Judge):
    """The probability that two answers are equivalent: class 1 of a classifier of text pairs."""

    _kind, _num_outputs = "a classifier of pairs", 2

    def __init__(self, directory: Path, tokenizer: Path, *, dtype: str, batch: int) -> None:
        super().__init__(directory, tokenizer, dtype=dtype, batch=batch)
        if None in (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id):
            raise UserError(f"the tokenizer in {tokenizer} has no [CLS] and [SEP], which separate the two answers")

    def __call__(self, answer: str, others: Sequence[str]) -> list[float]:
        """The probability of equivalence with each of the others, in order."""
        rows = [self._pair(answer, other) for other in others]
        pad = self._tokenizer.pad_token_id or 0
        return self._numbers(rows, pad, lambda logits: torch.softmax(logits, -1)[:, _EQUIVALENT])

    def _pair(self, *texts: str) -> _Row:
        """[CLS] first [SEP] second [SEP]."""
        first, second = (
            self._tokenizer.encode(text, truncation=True, max_length=_ANSWER_TOKENS, add_special_tokens=False)
            for text in texts
        )
        cls, sep = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        ids, kinds = [cls, *first, sep, *second, sep], [0] * (len(first) + 2) + [1] * (len(second) + 1)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": kinds}


class RewardModel(_Judge):
    """A number for how good an answer to a prompt is: the only output of a classifier of conversations."""

    _kind, _num_outputs = "a reward model", 1

    def __init__(self, directory: Path, *, dtype: str, batch: int) -> None:
        super().__init__(directory, directory, dtype=dtype, batch=batch)
        if self._tokenizer.chat_template is None:
            raise UserError(f"the tokenizer in {directory} has no chat template, by which a reward model reads answers")
        pad = self._tokenizer.pad_token_id
        # The reward is read at the last token that is no padding, which `transformers` finds by this id.
        self._model.config.pad_token_id = self._tokenizer.eos_token_id if pad is None else pad
        self._longest = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)

    def __call__(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """The reward of each answer, in order."""
        rows = [self._conversation(prompt, answer) for answer in answers]
        return self._numbers(rows, self._model.config.pad_token_id, lambda logits: logits[:, 0])

    def _conversation(self, prompt: str, answer: str) -> _Row:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        # The template writes the BOS itself. The paper's reference adds a second one, NoveltyBench's own code does not.
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self._tokenizer.encode(text, add_special_tokens=False)[: self._longest]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def has_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint brings a tokenizer; that of NoveltyBench's classifier is published elsewhere."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "spm.model", "vocab.txt"))


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
