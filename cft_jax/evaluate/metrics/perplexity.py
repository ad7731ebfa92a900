"""How the perplexity suite cuts a long text into overlapping windows, and which of its tokens each window scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens begin to end - 1 of a text, of which `num_scored` from `first_scored` on are scored."""

    begin: int
    end: int
    first_scored: int
    num_scored: int


def sliding_windows(
    length: int, *, context_length: int, stride: int, max_scored_tokens: int | None = None
) -> list[Window]:
    """The windows of the paper's reference implementation.

    A token is scored by the window that reaches it first, from the tokens before it in that window. So a text's first
    token is never scored, and without overlap no window's first token is; a lone last token is left out.

    Windows hold `context_length` tokens and begin `stride` apart; `max_scored_tokens` says where to stop, None nowhere.
    """
    windows, previous_end = [], 0
    left = length if max_scored_tokens is None else max_scored_tokens
    for begin in range(0, length, stride):
        end = min(begin + context_length, length)
        if end - begin < 2 or left <= 0:
            break
        first = max(previous_end, begin + 1)
        scored = min(end - first, left)
        if scored > 0:
            windows.append(Window(begin, end, first, scored))
            left -= scored
        if end == length:
            break
        previous_end = end
    return windows


def covering_windows(length: int, *, context_length: int, stride: int, prefixed: bool) -> list[Window]:
    """Windows that score every token once, behind a token of their own (BOS) or, without one, all but the first.

    Args:
      length: tokens of the text, that prefix aside.
      context_length: tokens of a window, prefix included.
      stride: tokens that a window scores at most, the first one aside; cut where a window would not see the token
        before those it scores.
      prefixed: whether each window begins with the prefix, from which the text's first token is predicted.
    """
    room = context_length - prefixed
    step = min(stride, room if prefixed else room - 1)
    windows, scored = [], 0 if prefixed else 1
    begin = 0
    while scored < length:
        end = min(begin + room, length)
        windows.append(Window(begin, end, scored, end - scored))
        scored, begin = end, begin + step
    return windows
