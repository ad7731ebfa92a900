"""What `train.keep` names: prompts to ask the base for texts, or texts and conversations that are kept as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cft_jax.common.errors import UserError
from cft_jax.distributions.questions import kept_prompts
from cft_jax.distributions.rows import Messages, Row, conversation, one_of, prompt_messages, read_rows, text_of

_PROMPTS, _TEXTS = "train.keep.prompts", "train.keep.source"


@dataclass(frozen=True)
class KeptText:
    """A text to keep: an answer to messages, or alone where there are none."""

    messages: Messages
    text: str


def read_prompts(path: str) -> list[Messages]:
    """The prompts in a JSONL file, each `prompt` or `messages`; the package's own for an empty path.

    Raises:
      UserError: see `read_rows`.
    """
    if not path:
        return [({"role": "user", "content": prompt},) for prompt in kept_prompts()]
    return read_rows(path, _PROMPTS, _prompt)


def read_texts(path: str) -> list[KeptText]:
    """The texts in a file.

    Each row of a JSONL file (`.jsonl`) is a conversation, `messages` with the assistant last or `prompt` and `answer`,
    or a `text`; any other file is one plain text.

    Raises:
      UserError: see `read_rows`; or there is no text in it.
    """
    if path.endswith(".jsonl"):
        return read_rows(path, _TEXTS, _kept_text)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {_TEXTS}={path!r}: {error.strerror}; name a file, or self") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_TEXTS}={path!r} is no text in UTF-8 ({error}); save it as UTF-8, or name another"
        ) from error
    except ValueError as error:  # a NUL in the path
        raise UserError(f"cannot read {_TEXTS}={path!r}: {error}; name a file, or self") from error
    if not text.strip():
        raise UserError(f"{_TEXTS}={path!r} has no text in it; name another file, or self")
    return [KeptText((), text)]


def _prompt(row: Row, _: int) -> Messages:
    _check_keys(row, [("prompt",), ("messages",)])
    return prompt_messages(row)


def _kept_text(row: Row, _: int) -> KeptText:
    _check_keys(row, [("messages",), ("prompt", "answer"), ("text",)])
    if "messages" in row:
        *messages, answer = conversation(row["messages"], last="assistant")
        return KeptText(tuple(messages), answer["content"])
    if "text" in row:
        return KeptText((), text_of(row["text"], "text"))
    return KeptText(prompt_messages(row), text_of(row["answer"], "answer"))


def _check_keys(row: Row, allowed: Sequence[tuple[str, ...]]) -> None:
    if not any(row.keys() == set(keys) for keys in allowed):
        ways = [" with ".join(keys) for keys in allowed]
        raise UserError(f"has {', '.join(row) or 'nothing'}; it must have exactly {one_of(ways)}")
