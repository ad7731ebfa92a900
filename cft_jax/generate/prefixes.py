"""Samples that have drawn the same tokens, and what becomes of them when they draw the next.

Such samples are one prefix, and a prefix is one row of the decode: the forward pass is shared, and so is its softmax;
only the draws are the samples' own. A thousand numeric answers need some hundred rows this way; texts of which each
goes its own way become one row each by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt32

from cft_jax.generate.stops import StopStrings


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued.

    Attributes:
      index: its place among the prompts of the call.
      prompt: token ids.
      key: of its draws (`request_key`).
    """

    index: int
    prompt: Sequence[int]
    key: UInt32[np.ndarray, "2"]


@dataclass(frozen=True)
class Completion:
    """A finished sample.

    Attributes:
      tokens: drawn, without the stop token.
      reason: "stop" (a stop token), "stop_string" or "length".
    """

    tokens: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Limits:
    """When a sample ends.

    Attributes:
      stop_ids: tokens that end it; not part of its text.
      stop_strings: texts that end it.
      max_new_tokens: its longest length.
    """

    stop_ids: frozenset[int]
    stop_strings: StopStrings
    max_new_tokens: int

    def end(self, tokens: list[int], token: int) -> Completion | None:
        """How a sample ends that draws `token` after `tokens`; None if it goes on."""
        if token in self.stop_ids:
            return Completion(tuple(tokens), "stop")
        if self.stop_strings.strings and self.stop_strings.reached([*tokens, token]):
            return Completion((*tokens, token), "stop_string")
        if len(tokens) + 1 == self.max_new_tokens:
            return Completion((*tokens, token), "length")
        return None


@dataclass(eq=False)
class DecodeBranch:
    """Tokens that some samples of a request have drawn.

    Attributes:
      tokens: the tokens.
      samples: numbers of the samples.
      fed: how many tokens its row has been fed: the prompt's last token, then its own.
      source: the row whose cache it continues; -1 where it begins from the prompt.
    """

    tokens: list[int]
    samples: Int[np.ndarray, "n"]
    fed: int
    source: int

    @property
    def draws(self) -> bool:
        """Whether the next step draws; else it feeds again what an earlier row was fed."""
        return self.fed == len(self.tokens)

    def begin_again(self) -> None:
        """Gives up the cache it would have continued."""
        self.fed, self.source = 0, -1


# Who finished, and how.
Finished = tuple[Int[np.ndarray, "_"], Completion]


def advance(
    prefix: DecodeBranch, drawn: Int[np.ndarray, "n X"], limits: Limits
) -> tuple[list[DecodeBranch], list[Finished]]:
    """What becomes of a prefix whose samples have drawn.

    Args:
      prefix: the prefix; changed if it goes on.
      drawn: the tokens of each sample; several columns only for a single sample.
      limits: when samples end.

    Returns:
      The prefixes that go on, first `prefix` itself, then those that branch off from it; and who finished.
    """
    if prefix.samples.size == 1:
        for token in drawn[0].tolist():
            end = limits.end(prefix.tokens, token)
            if end is not None:
                return [], [(prefix.samples, end)]
            prefix.tokens.append(token)
        prefix.fed = len(prefix.tokens)
        return [prefix], []
    going_on: list[tuple[int, np.ndarray]] = []
    finished: list[Finished] = []
    different, which = np.unique(drawn[:, 0], return_inverse=True)
    for number, token in enumerate(different.tolist()):
        samples = prefix.samples[which == number]
        end = limits.end(prefix.tokens, token)
        if end is None:
            going_on.append((token, samples))
        else:
            finished.append((samples, end))
    fed = len(prefix.tokens) + 1
    branches = [DecodeBranch([*prefix.tokens, token], samples, fed, prefix.source) for token, samples in going_on[1:]]
    if not going_on:
        return [], finished
    token, prefix.samples = going_on[0]
    prefix.tokens.append(token)
    prefix.fed = fed
    return [prefix, *branches], finished
