"""The perplexity suite: how well the model predicts ordinary text, in PALOMA's layout `<slice>/<split>/*.jsonl.gz`.

Two metrics stand side by side. `paper` repeats the reference implementation: windows without BOS, the first token of
a text (and of every window that does not overlap the one before) unscored, bits over all bytes. `covering` puts the
tokenizer's BOS before every window, scores every token once and counts the bytes of scored tokens. Finished batches
of documents are kept, so a killed evaluation resumes where it stopped and ends with the same numbers.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.config.suites import PerplexityConfig
from cft_jax.evaluate.metrics import covering_windows, sliding_windows
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.store import Key, Record, run_resumable
from cft_jax.evaluate.suites.data_sets import json_lines
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary
from cft_jax.text import tokenizer as tokens

SUITE = "perplexity"
VERSION = 1  # part of every fingerprint: raise it when the same inputs come to other records
# Text handed to the backend at once, about 64,000 tokens; a killed run repeats at most this.
_BYTES_AT_ONCE = 1 << 18
_WAYS = ("paper", "covering")
_GET = "hf download allenai/paloma --repo-type dataset --local-dir paloma"
_LICENCE = "after accepting its licence at https://huggingface.co/datasets/allenai/paloma"


# A file, and its documents from one number to before another, which are measured together.
Batch = tuple[Path, int, int]


def check(config: Config, _: Path) -> None:
    """See `Suite.check`."""
    find_files(config.suite.perplexity)


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`; `per_prompt.csv` has a row per file, `samples.jsonl.gz` one per document."""
    settings, weights = context.config.suite.perplexity, context.backend.fingerprint
    batches, digest = plan(settings)
    # Where the data lies does not matter, only what it says.
    asked = asdict(settings) | {"data": digest}
    fingerprint = fingerprint_of(SUITE, VERSION, weights, tokens.fingerprint(context.tokenizer), asked)
    # Batches come in order, so that every file is read once.
    texts_of = functools.lru_cache(maxsize=1)(lambda path: _texts(path, settings.max_documents))
    with context.results.store(fingerprint) as store:
        records = run_resumable(
            store,
            batches,
            _key,
            lambda members: [measure(context, batch, texts_of(batch[0])) for batch in members],
            at_once=1,
            what="evaluate perplexity",
            unit="part",
        )
    files, metrics = summarise(records)
    samples = [{"slice": r["split"], "file": r["file"]} | document for r in records for document in r["documents"]]
    return context.results.finish(SUITE, fingerprint, asdict(settings), metrics, rows=files, samples=samples)


def plan(settings: PerplexityConfig) -> tuple[list[Batch], str]:
    """All documents in batches, and a digest of their texts; every file is read once and checked.

    Raises:
      UserError: there is no such directory, it holds no files, or one of them is damaged.
    """
    digest = hashlib.sha256()
    batches: list[Batch] = []
    for path in find_files(settings):
        start = size = 0
        texts = _texts(path, settings.max_documents)
        for stop, text in enumerate(texts, 1):
            encoded = text.encode()
            digest.update(f"{path.parent.parent.name}/{path.name} {len(encoded)}\n".encode() + encoded)
            size += len(encoded)
            if size >= _BYTES_AT_ONCE or stop == len(texts):
                batches.append((path, start, stop))
                start, size = stop, 0
    return batches, digest.hexdigest()


def measure(context: SuiteContext, batch: Batch, texts: Sequence[str]) -> Record:
    """The record of a batch of a file's texts: of each document the tokens, bytes and, per way of cutting, the sums."""
    settings, tokenizer = context.config.suite.perplexity, context.tokenizer
    (path, start, stop), (slice_, name) = batch, _key(batch)
    texts = texts[start:stop]
    encodings = tokens.backend(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    documents: list[dict[str, Any]] = [
        {"document": number, "num_tokens": len(encoding.ids), "num_bytes": len(text.encode())}
        for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True), start)
    ]
    for way in settings.windows:
        prefix = [] if way == "paper" or tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]  # type: ignore[arg-type]
        cut = sliding_windows if way == "paper" else functools.partial(covering_windows, prefixed=bool(prefix))
        cuts = [
            cut(len(encoding.ids), context_length=settings.context_length, stride=settings.stride)
            for encoding in encodings
        ]
        rows = [
            [*prefix, *encoding.ids[window.begin : window.end]]
            for encoding, windows in zip(encodings, cuts, strict=True)
            for window in windows
        ]
        answers = iter(context.backend.token_log_probs(rows))
        for document, text, encoding, windows in zip(documents, texts, encodings, cuts, strict=True):
            nll = 0.0
            for window in windows:
                first = window.first_scored - window.begin + len(prefix) - 1
                scored = next(answers)[first : first + window.num_scored]
                nll -= float(scored.sum(dtype=np.float64))
            num_bytes = document["num_bytes"]
            if way == "covering" and not prefix and encoding.ids:
                # Without BOS nothing predicts the first token, so its bytes do not count.
                num_bytes = len(text[encoding.offsets[0][1] :].encode())
            document[way] = {"nll": nll, "num_scored": sum(w.num_scored for w in windows), "num_bytes": num_bytes}
    return {"split": slice_, "task_id": name, "file": path.name, "documents": documents}


def summarise(records: Sequence[Record]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all files, and the metrics of every slice and of the whole."""
    files: dict[tuple[str, str], list[dict[str, Any]]] = {}
    slices: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        files.setdefault((record["split"], record["file"]), []).extend(record["documents"])
        slices.setdefault(record["split"], []).extend(record["documents"])
    rows = []
    for (slice_, name), documents in files.items():
        row: dict[str, Any] = {"slice": slice_, "file": name}
        for group, value in metrics_of(documents).items():
            row |= {f"{group}.{key}": item for key, item in value.items()} if group in _WAYS else {group: value}
        rows.append(row)
    whole = metrics_of([document for documents in slices.values() for document in documents])
    return rows, {"total": whole, "slices": {name: metrics_of(documents) for name, documents in slices.items()}}


def metrics_of(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over documents, and for every way of cutting them `nll` (nats per token), `perplexity`, `bits_per_byte`."""
    found: dict[str, Any] = {"num_documents": len(documents)}
    for way in _WAYS:
        parts = [document[way] for document in documents if way in document]
        scored, num_bytes = (sum(part[name] for part in parts) for name in ("num_scored", "num_bytes"))
        if not scored:
            continue
        total = math.fsum(part["nll"] for part in parts)
        bits_per_byte = total / math.log(2) / num_bytes
        section = {"num_scored": scored, "num_bytes": num_bytes, "nll": total / scored, "bits_per_byte": bits_per_byte}
        # A model that rules a token out has no perplexity that a float could hold.
        if total / scored < 700:
            section["perplexity"] = math.exp(total / scored)
        found[way] = section
    return found


def find_files(settings: PerplexityConfig) -> list[Path]:
    """The files of the data set, in order.

    Raises:
      UserError: there are none: where they were looked for, and how to get them.
    """
    fix = f"get the data with `{_GET}` ({_LICENCE}) and set config.suite.perplexity.data=paloma"
    if not settings.data:
        raise UserError(f"config.suite.perplexity.data is empty; {fix}")
    root = Path(settings.data).expanduser()
    if not root.is_dir():
        raise UserError(f"config.suite.perplexity.data={settings.data!r}: no such directory; {fix}")
    found = []
    for name in settings.slices or ["*"]:
        files = sorted(root.glob(f"{name}/{settings.split}/*.jsonl.gz"))
        if not files:
            shown = f"{root}/{name if settings.slices else '<slice>'}/{settings.split}/*.jsonl.gz"
            raise UserError(f"no files {shown}; check config.suite.perplexity's slices and split, or {fix}")
        found += files
    return found


def _key(batch: Batch) -> Key:
    """Of its record in the store: the slice of the data set, and the file's name with the documents."""
    path, start, stop = batch
    return path.parent.parent.name, f"{path.name}:{start}-{stop}"


def _texts(path: Path, limit: int) -> list[str]:
    """The documents of a file, at most `limit` where that is not 0."""
    texts = []
    for number, row in itertools.islice(json_lines(path), limit or None):
        text = row.get("text") if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number} has no text in its field `text`; copy the file again")
        # Half a surrogate pair, which JSON can hold, is no character.
        texts.append(text.encode("utf-8", "replace").decode("utf-8"))
    return texts
