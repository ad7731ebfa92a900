"""Which tokens of a document are scored from which window, for perplexities of documents longer than the context."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) are read together; those from `first_scored` on are scored, `num_scored` of them.

    Positions are absolute in the document; a token is scored from the logits of the token before it in the window.
    """

    begin: int
    end: int
    first_scored: int
    num_scored: int


def sliding_windows(
    length: int, *, context_length: int, stride: int, max_scored_tokens: int | None = None
) -> list[Window]:
    """The paper's windows: starts are multiples of `stride`, and a token is scored in the first window that can.

    With `stride == context_length` the windows do not overlap and the first token of each is never scored.

    Args:
      length: number of tokens of the document.
      context_length: most tokens of a window.
      stride: distance of neighbouring starts.
      max_scored_tokens: where to stop; the last window is scored up to the budget.

    Returns:
      The windows that score anything, in order.
    """
    windows: list[Window] = []
    budget = length if max_scored_tokens is None else max_scored_tokens
    previous_end = 0
    for begin in range(0, length, stride):
        end = min(begin + context_length, length)
        if end - begin < 2 or budget <= 0:
            break
        first = max(previous_end, begin + 1)
        scored = min(end - first, budget)
        if scored > 0:
            windows.append(Window(begin, end, first, scored))
            budget -= scored
        previous_end = end
        if end == length:
            break
    return windows


def covering_windows(length: int, *, context_length: int, stride: int) -> list[Window]:
    """Windows that score every token of a document but its first exactly once.

    The first window is as long as the context; each later one ends `stride` tokens further on and reads as many
    tokens before the newly scored ones as the context holds, at least one.

    Raises:
      ValueError: `stride` leaves no token of context.
    """
    if not 1 <= stride < context_length:
        raise ValueError(f"stride={stride} must be at least 1 and below context_length={context_length}")
    windows: list[Window] = []
    scored_to = 1
    while scored_to < length:
        end = min(length, context_length if scored_to == 1 else scored_to + stride)
        windows.append(Window(max(0, end - context_length), end, scored_to, end - scored_to))
        scored_to = end
    return windows
