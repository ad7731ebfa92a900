"""One whole example in words, for the log at the start of a run."""

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from cft_jax.data.batch import TargetBatch

_SHOWN = 6


def render_example(
    tokenizer: PreTrainedTokenizerBase, batch: TargetBatch, shared_prefix: Int32[np.ndarray, "_"], row: int = 0
) -> str:
    """The first example of a row of a batch, as the model sees it.

    Shows the prompt's text, its first and last token ids, its strings (some of many), and which positions carry
    loss.

    Args:
      tokenizer: of the model.
      batch: from `Dataset.batch`.
      shared_prefix: the tokens that its prompts begin with and that it leaves out (`Dataset.shared_prefix`).
      row: which row.
    """
    size = int(batch.subtree_end[row, 0])
    scored = batch.target_index[row, batch.target_weight[row] > 0]
    scored = scored[scored < size]
    if not scored.size:
        return "a row of padding"
    tokens, subtree_end = batch.tokens[row, :size], batch.subtree_end[row, :size]
    # The first target position is the empty prefix, at the prompt's last token.
    start = int(scored[0]) + 1
    prompt = np.concatenate([shared_prefix, tokens[:start]])
    inner = np.arange(start, size)
    ends = inner[subtree_end[inner] == inner + 1]
    strings = [_string(tokenizer, tokens, subtree_end, start, int(end)) for end in ends[:_SHOWN]] or [""]
    more = f" and {ends.size - _SHOWN} more" if ends.size > _SHOWN else ""
    first, last = (", ".join(map(str, ids.tolist())) for ids in (prompt[:_SHOWN], prompt[-_SHOWN:]))
    at = _ranges_in_words((scored + shared_prefix.size).tolist())
    return "\n".join(
        [
            "one example, as the model sees it:",
            "  prompt: " + repr(_text(tokenizer, prompt)),
            f"  its token ids: {first}, ..., {last} ({prompt.size} tokens)",
            "  answers: " + ", ".join(map(repr, strings)) + more,
            f"  loss at {scored.size} of {shared_prefix.size + size} positions: {at}",
        ]
    )


def _string(
    tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, subtree_end: np.ndarray, start: int, end: int
) -> str:
    """The string that ends at a position: the tokens after the prompt that this position sees."""
    seen = np.arange(start, end + 1)
    path = tokens[seen[subtree_end[seen] > end]]
    return _text(tokenizer, path)


def _text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    # Without the option, transformers 4 drops spaces before punctuation for some tokenizers.
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _ranges_in_words(numbers: list[int]) -> str:
    """Ascending numbers as ranges: 3-7, 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)
