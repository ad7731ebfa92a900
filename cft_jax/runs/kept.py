"""The texts that a run keeps: read from a file, or drawn once from the base before training and kept in its workdir."""

import json
from collections.abc import Sequence

import jax
from absl import logging
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically
from cft_jax.common.storage import Workdir
from cft_jax.config import Config
from cft_jax.data.kept import KeptTexts, kept_texts
from cft_jax.distributions.kept import KeptText, read_prompts, read_texts
from cft_jax.distributions.rows import Messages
from cft_jax.generate import Sampler
from cft_jax.models.transformer import Transformer
from cft_jax.text import ChatOptions, encode_chats, terminator_id
from cft_jax.text.tokenizer import encode_strings
from cft_jax.train.state import without_adapters

DIRECTORY, FILE = "keep", "texts.jsonl"
SELF = "self"
# At least so many texts are drawn, and at least one to each prompt.
_DRAWN = 256
# Room for an answer behind a prompt.
_SHORTEST_ANSWER = 8


def read_kept(config: Config) -> list[KeptText] | list[Messages] | None:
    """What the configuration names: texts of a file, or for `self` the prompts to ask; None for a run that keeps none.

    Raises:
      UserError: the file is wrong.
    """
    keep = config.train.keep
    if keep.weight == 0 or keep.kind == "off_support":
        return None
    return read_prompts(keep.prompts) if keep.source == SELF else read_texts(keep.source)


def encode_kept(
    config: Config, named: list[KeptText] | list[Messages] | None, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]] | None:
    """Token ids of what `read_kept` returns.

    Raises:
      UserError: a prompt is too long.
    """
    if named is None:
        return None
    keep, options = config.train.keep, ChatOptions.from_config(config.data)
    texts = [one for one in named if isinstance(one, KeptText)]
    if texts:
        return _encoded(tokenizer, texts, options, terminator_id(tokenizer, config.data.terminator))
    encoded = encode_chats(tokenizer, [one for one in named if not isinstance(one, KeptText)], options)
    longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
    room = config.data.max_length - _SHORTEST_ANSWER
    if len(encoded[longest]) > room:
        raise UserError(
            f"prompt {longest + 1} of config.train.keep.prompts={keep.prompts!r} has {len(encoded[longest])} tokens, "
            f"more than the {room} that config.data.max_length={config.data.max_length} leaves beside an answer of "
            f"{_SHORTEST_ANSWER}; raise it or shorten the prompt"
        )
    return encoded


def load_kept(
    config: Config,
    read: Sequence[list[int]] | None,
    model: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Workdir,
    *,
    row_multiple: int,
) -> KeptTexts | None:
    """The rows of texts that the steps of a run take theirs from; None for a run that keeps none.

    Args:
      config: of the run.
      read: see `encode_kept`.
      model: with the base's weights; answers are drawn without its adapters.
      tokenizer: of the model.
      workdir: of the run; keeps the texts that were drawn.
      row_multiple: batches have a multiple of so many rows.

    Raises:
      UserError: no text has two tokens.
    """
    if read is None:
        return None
    is_drawn = config.train.keep.source == SELF
    texts = _drawn(config, read, model, tokenizer, workdir) if is_drawn else read
    length, rows = config.data.max_length, config.train.keep.rows
    try:
        kept = kept_texts(texts, length=length, per_step=rows, row_multiple=row_multiple, seed=config.seed)
    except ValueError as error:
        raise UserError(f"config.train.keep.source={config.train.keep.source!r}: {error}; name another file") from error
    logging.info("keeping %s texts in %s rows of %d tokens", f"{len(texts):,}", f"{len(kept.rows.tokens):,}", length)
    return kept


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[KeptText], options: ChatOptions, end: int
) -> list[list[int]]:
    """A conversation as training and sampling have it: the chat up to the answer, the answer, the terminator."""
    answers = encode_strings(tokenizer, [text.text for text in texts])
    prompts = iter(encode_chats(tokenizer, [text.messages for text in texts if text.messages], options))
    return [
        [*next(prompts), *answer, end] if text.messages else answer for text, answer in zip(texts, answers, strict=True)
    ]


def _drawn(
    config: Config,
    prompts: Sequence[list[int]],
    model: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Workdir,
) -> list[list[int]]:
    """The base's own answers, each behind its prompt; drawn once, then read from the workdir."""
    path = workdir.path / DIRECTORY / FILE
    is_there = bool(multihost_utils.broadcast_one_to_all(path.exists()))
    if not is_there:
        sampler = Sampler(without_adapters(model), tokenizer, chat=ChatOptions.from_config(config.data))
        end = terminator_id(tokenizer, config.data.terminator)
        most = config.data.max_length - max(map(len, prompts))
        logging.info("drawing the base's answers to %d prompts, to keep them", len(prompts))
        drawn = sampler.complete(prompts, num_samples=-(-_DRAWN // len(prompts)), max_new_tokens=most, seed=config.seed)
        texts = [
            [*prompt, *answer.tokens, *([end] if answer.reason == "stop" else [])]
            for prompt, answers in zip(prompts, drawn, strict=True)
            for answer in answers
        ]
        if jax.process_index() == 0:
            lines = ({"tokens": tokens, "text": tokenizer.decode(tokens)} for tokens in texts)
            write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            workdir.publish()
        return texts
    multihost_utils.sync_global_devices("kept texts")
    if jax.process_index() > 0:
        workdir.fetch(DIRECTORY)
    # Not splitlines(): it would also break lines at separators that JSON strings may hold.
    return [json.loads(line)["tokens"] for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
