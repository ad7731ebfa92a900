"""The sampler: prompts prefilled once, samples that share a prefix decoded as one row, rows refilled as they end."""

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.generate.branches import Completion, DecodeBranch, Grid, Limits, Request, Slot, advance
from cft_jax.generate.decode import MAX_STEPS, Rows, decode, move_rows, replace_prompts
from cft_jax.generate.prefill import cache_bytes_per_token, check_prompts, empty_cache, prefill
from cft_jax.generate.sampling import SamplingSettings, request_key, uniforms
from cft_jax.generate.split_model import SplitModel
from cft_jax.generate.stops import StopStrings, model_stop_ids
from cft_jax.models.transformer import Transformer
from cft_jax.text.chat import ChatOptions, Messages, encode_chats
from cft_jax.text.tree_rows import bucket

# Tokens of prompts in one forward pass.
_PREFILL_TOKENS = 8192
# Rows decoded at a time, and memory for keys and values, by default.
BATCH_SIZE, CACHE_BYTES = 1024, 2 << 30
# Columns of the rows' caches at the start; they grow fourfold.
_FIRST_COLUMNS = 16


class Sampler:
    """Draws completions from a model.

    A completion depends on the request alone: its seed, its prompt and the sample's number. Batch size, order and
    company change only how numbers are rounded, and a draw differs only where its random number lies within rounding
    of the boundary between two tokens.

    Args:
      model: the language model, merged or with adapters, on one device or on a mesh.
      tokenizer: of the model.
      stop_ids: tokens that end a text; None for all that the checkpoint, the tokenizer and the chat template name.
      batch_size: rows decoded at a time.
      cache_bytes: memory for keys and values, over all devices; fewer rows are decoded where it is short.
      chat: how messages become token ids.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        cache_bytes: int = CACHE_BYTES,
        chat: ChatOptions | None = None,
    ) -> None:
        self.stop_ids = model_stop_ids(model, tokenizer) if stop_ids is None else tuple(stop_ids)
        self._split, self._tokenizer = SplitModel.of(model), tokenizer
        self._vocab_size, self._bytes_per_token = model.config.vocab_size, cache_bytes_per_token(model)
        self._batch_size, self._cache_bytes = batch_size, cache_bytes
        self._chat = ChatOptions() if chat is None else chat

    def sample(
        self,
        prompts: Sequence[Sequence[int] | Messages],
        *,
        num_samples: int,
        max_new_tokens: int,
        seed: int | Sequence[int],
        temperature: float | int = 1.0,
        top_p: float | int = 1.0,
        stop: str | Sequence[str] | None = None,
    ) -> list[list[str]]:
        """Completions of every prompt as text.

        Args:
          prompts: each a list of token ids, or of messages (records with "role" and "content").
          num_samples: completions per prompt.
          max_new_tokens: the longest completion, in tokens.
          seed: one for all prompts, or one for each. With the same seed, different prompts get independent draws.
          temperature: divides the logits; 0 is greedy.
          top_p: see `SamplingSettings`.
          stop: texts that end a completion; they and what follows are cut off.

        Returns:
          For each prompt its texts, without stop token and special tokens.

        Raises:
          UserError: an argument is out of its range, a prompt is empty, or a token is not in the vocabulary.
        """
        completions = self.complete(
            prompts, num_samples=num_samples, max_new_tokens=max_new_tokens, seed=seed,
            temperature=temperature, top_p=top_p, stop=stop,
        )  # fmt: skip
        strings = StopStrings(self._tokenizer, stop)
        texts: dict[Completion, str] = {}
        for item in {item for items in completions for item in items}:
            texts[item] = strings.cut(strings.text(item.tokens))
        return [[texts[item] for item in items] for items in completions]

    def complete(
        self,
        prompts: Sequence[Sequence[int] | Messages],
        *,
        num_samples: int,
        max_new_tokens: int,
        seed: int | Sequence[int],
        temperature: float | int = 1.0,
        top_p: float | int = 1.0,
        stop: str | Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        """As `sample`, but tokens and how each completion ended."""
        settings = SamplingSettings(temperature, top_p)
        for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        ids = self._token_ids(prompts)
        check_prompts(ids, self._vocab_size)
        limits = Limits(frozenset(self.stop_ids), StopStrings(self._tokenizer, stop), max_new_tokens)
        results: list[list[Any]] = [[None] * num_samples for _ in ids]
        lengths: dict[int, list[Request]] = {}
        for request in _requests(ids, seed):
            lengths.setdefault(bucket(len(request.prompt) - 1, least=32), []).append(request)
        for length, requests in lengths.items():
            sizes = decode_sizes(
                self._bytes_per_token, length, requests=len(requests), num_samples=num_samples,
                max_new_tokens=max_new_tokens, batch_size=self._batch_size, cache_bytes=self._cache_bytes,
            )  # fmt: skip
            run = _Decode(self._split, requests, num_samples, limits, settings, sizes)
            for index, samples, completion in run.completions():
                for sample in samples.tolist():
                    results[index][sample] = completion
        return results

    def _token_ids(self, prompts: Sequence[Sequence[int] | Messages]) -> list[list[int]]:
        if any(isinstance(prompt, str) for prompt in prompts) or isinstance(prompts, str):
            raise UserError("a prompt is a list of token ids or of messages, not a text; give [{'role': ..., ...}]")
        are_chats = [len(prompt) > 0 and isinstance(prompt[0], Mapping) for prompt in prompts]
        chats: Any = list(itertools.compress(prompts, are_chats))
        encoded = iter(encode_chats(self._tokenizer, chats, self._chat) if chats else ())
        given: Any = zip(prompts, are_chats, strict=True)
        return [next(encoded) if is_chat else [int(token) for token in prompt] for prompt, is_chat in given]


def _requests(prompts: Sequence[Sequence[int]], seed: int | Sequence[int]) -> Iterator[Request]:
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise UserError(f"seed has {len(seeds)} numbers for {len(prompts)} prompts; give one, or one for each")
    seen: Counter[tuple[int, ...]] = Counter()
    for index, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
        same = (own, *prompt)
        yield Request(index, prompt, request_key(own, prompt, seen[same]))
        seen[same] += 1


@dataclass(frozen=True)
class DecodeSizes:
    """Shapes of one run: columns of a prompt's cache, prompts at a time, rows per prompt to choose from, draws."""

    prompt_length: int
    slots: int
    rows: tuple[int, ...]
    draws: int

    @property
    def prefilled(self) -> int:
        """Prompts that are prefilled at a time."""
        return min(max(_PREFILL_TOKENS // self.prompt_length, 1), self.slots)


def decode_sizes(
    bytes_per_token: int,
    length: int,
    *,
    requests: int,
    num_samples: int,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    cache_bytes: int = CACHE_BYTES,
) -> DecodeSizes:
    """As many prompts and rows at a time as batch size and memory hold; see `Sampler` and `cache_bytes_per_token`."""
    # Moving rows takes a second array beside the first.
    tokens = cache_bytes // (2 * bytes_per_token)
    rows = min(max(tokens // max_new_tokens, 1), batch_size)
    per_slot = min(bucket(num_samples, least=1), 1 << (rows.bit_length() - 1))
    slots = min(max(rows // per_slot, 1), requests, max(tokens // length, 1))
    growing = [4**power for power in range(16) if 16 <= slots * 4**power and 4**power < per_slot]
    return DecodeSizes(length, slots, (*growing, per_slot), bucket(slots * num_samples, least=16, factor=4))


class _Decode:
    """One run over requests whose prompts fit the same cache."""

    def __init__(
        self,
        split: SplitModel,
        requests: Sequence[Request],
        num_samples: int,
        limits: Limits,
        settings: SamplingSettings,
        sizes: DecodeSizes,
    ) -> None:
        self._split, self._queue, self._num_samples = split, deque(requests), num_samples
        self._limits, self._settings, self._sizes = limits, settings, sizes
        self._grid = Grid(sizes.slots, sizes.rows)
        self._columns = min(_FIRST_COLUMNS, limits.max_new_tokens)
        # Steps since column 0 was last the oldest.
        self._clock = 0
        self._prompt = empty_cache(split, rows=sizes.slots, length=sizes.prompt_length)
        self._own = empty_cache(split, rows=sizes.slots * self._grid.size, length=self._columns)
        self._stop_ids = np.array(sorted(limits.stop_ids), np.int32)

    def completions(self) -> Iterator[tuple[int, Int[np.ndarray, "_"], Completion]]:
        """What finished samples are: index of the prompt, numbers of the samples, what they drew."""
        while True:
            self._take_up()
            if all(slot.wanted == 0 for slot in self._grid.slots):
                return
            fresh = self._arrange()
            asked = [item for item in self._grid.branches() if item[2].draws]
            drawn = self._step(asked, fresh)
            done = 0
            for _, _, branch in self._grid.branches():
                if not branch.draws:
                    branch.fed += 1
            for row, slot, branch in asked:
                index, count = branch.request.index, branch.samples.size
                continuing, finished = advance(branch, drawn[done : done + count], self._limits)
                done += count
                slot.rows[row % self._grid.size] = continuing[0] if continuing else None
                slot.branches += continuing[1:]
                yield from ((index, samples, completion) for samples, completion in finished)

    def _take_up(self) -> None:
        """Fills empty slots with requests from the queue."""
        empty = [index for index, slot in enumerate(self._grid.slots) if slot.wanted == 0]
        at_a_time = max(_PREFILL_TOKENS // self._sizes.prompt_length, 1)
        while empty and self._queue:
            indices = empty[: min(at_a_time, len(self._queue))]
            empty = empty[len(indices) :]
            prompts = []
            for index in indices:
                request, samples = self._queue.popleft(), np.arange(self._num_samples)
                self._grid.slots[index].waiting = [DecodeBranch(request, [], samples, fed=0, source=-1)]
                prompts.append(request.prompt)
            rows = min(bucket(len(indices), least=1, factor=4), self._sizes.slots)
            new = prefill(self._split, prompts, rows=rows, length=self._sizes.prompt_length)
            where = np.full(rows, self._sizes.slots, np.int32)
            where[: len(indices)] = indices
            self._prompt = replace_prompts(self._split, self._prompt, new, where)

    def _arrange(self) -> np.ndarray:
        """Gives branches rows and rows columns; returns which rows begin anew."""
        source, moves = self._grid.arrange()
        longest = max(branch.fed for _, _, branch in self._grid.branches())
        columns = self._columns
        while longest + 1 > columns:
            columns = min(4 * columns, self._limits.max_new_tokens)
        if moves or columns != self._columns:
            oldest = np.int32(self._clock % self._columns)
            self._own = move_rows(self._split, self._own, source, oldest, length=columns)
        if columns != self._columns:
            self._columns, self._clock = columns, self._columns
        return source < 0

    def _step(self, asked: Sequence[tuple[int, Slot, DecodeBranch]], fresh: np.ndarray) -> np.ndarray:
        """Tokens of all draws of the rows asked, [draws, steps]."""
        rows, longest, done = self._rows(fresh), 0, 0
        draw_row, sample, step = (np.zeros(self._sizes.draws, np.int32) for _ in range(3))
        key = np.zeros((self._sizes.draws, 2), np.uint32)
        for number, (row, _, branch) in enumerate(asked):
            own = slice(done, done + branch.samples.size)
            draw_row[own], key[own] = number, branch.request.key
            sample[own], step[own] = branch.samples, len(branch.tokens)
            rows.asked[number], rows.draw[row] = row, done
            done, longest = own.stop, max(longest, branch.fed)
        alone = done == len(asked) == rows.alive.sum()
        steps = min(MAX_STEPS, self._columns - longest) if alone else 1
        self._own, out, taken = decode(
            self._split,
            self._prompt,
            self._own,
            np.int32(self._clock % self._columns),
            rows,
            np.int32(len(asked)),
            draw_row,
            uniforms(key, sample, step, steps=MAX_STEPS),
            np.int32(done),
            self._stop_ids,
            np.int32(steps),
            method=self._settings.method,
            temperature=np.float32(self._settings.temperature or 1),
            top_p=np.float32(self._settings.top_p),
        )
        self._clock += int(taken)
        return np.asarray(out)[:done, : int(taken)]

    def _rows(self, fresh: np.ndarray) -> Rows:
        count = fresh.size
        tokens, positions, draw, asked = (np.zeros(count, np.int32) for _ in range(4))
        alive = np.zeros(count, bool)
        for row, _, branch in self._grid.branches():
            prompt, fed = branch.request.prompt, branch.fed
            tokens[row] = branch.tokens[fed - 1] if fed else prompt[-1]
            positions[row] = len(prompt) - 1 + fed
            alive[row] = True
        return Rows(tokens, positions, alive, fresh, draw, asked)  # type: ignore[arg-type]
