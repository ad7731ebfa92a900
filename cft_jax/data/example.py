"""One whole example in words, for the log at the start of a run."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from cft_jax.data.batch import TargetBatch

_SHOWN = 6


def render_example(tokenizer: PreTrainedTokenizerBase, batch: TargetBatch, row: int = 0) -> str:
    """A row of a batch as the model sees it.

    Shows the prompt's text, the first and last token ids, the strings in the row (some of many), and which positions
    carry loss.
    """
    steps = np.flatnonzero(batch.step_weight[row] > 0)
    if not steps.size:
        return "a row of padding"
    positions = batch.step_index[row, steps]
    num_tokens = int((batch.until[row] > 0).sum())
    tokens, until = batch.tokens[row, :num_tokens], batch.until[row, :num_tokens]
    # The tokens that all later ones see, in places of their own, are the prompt; the first step is at its last.
    prompt = tokens[: positions[0] + 1]
    inner = np.arange(positions[0] + 1, num_tokens)
    ends = inner[until[inner] == inner + 1]
    strings = [_string(tokenizer, tokens, until, prompt.size, int(end)) for end in ends[:_SHOWN]] or [""]
    more = f" and {ends.size - _SHOWN} more" if ends.size > _SHOWN else ""
    ids = ", ".join(map(str, tokens[:_SHOWN].tolist()))
    last = ", ".join(map(str, prompt[-_SHOWN:].tolist()))
    return "\n".join(
        [
            "one example, as the model sees it:",
            "  prompt: " + repr(_text(tokenizer, prompt)),
            f"  its token ids: {ids}, ..., {last} ({prompt.size} tokens)",
            "  answers: " + ", ".join(map(repr, strings)) + more,
            f"  loss at {steps.size} of {num_tokens} positions: {_ranges_in_words(positions.tolist())}",
        ]
    )


def _string(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, until: np.ndarray, start: int, end: int) -> str:
    """The string that ends at a position: the tokens after the prompt that this position sees."""
    seen = np.arange(start, end + 1)
    path = tokens[seen[until[seen] > end]]
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
