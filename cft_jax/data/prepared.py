"""Tasks made ready for a model: their prompts' token ids and their tries, built once and kept in a cache."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.common.files import user_cache
from cft_jax.common.progress import Progress
from cft_jax.config import DataConfig
from cft_jax.data import cache
from cft_jax.data.spaces import listed_forest, task_space
from cft_jax.distributions.analytic_space import AnalyticSpace
from cft_jax.distributions.tasks import Task, digest_of_tasks
from cft_jax.text.analytic_trie import AnalyticTrie
from cft_jax.text.chat import ChatOptions, encode_chats, terminator_id
from cft_jax.text.digits import digit_tokens
from cft_jax.text.number_grammar import NumberTokens
from cft_jax.text.tokenizer import fingerprint
from cft_jax.text.trie import ARRAYS, Forest
from cft_jax.text.values import ValueEncoder

_TASKS_AT_ONCE = 32
# The packages whose code decides what is cached.
_CODE = ("distributions", "text", "data")


@dataclass(frozen=True, eq=False)
class Prepared:
    """Tasks with their prompts and tries.

    Attributes:
      prompts: token ids of each task's prompt, the generation prompt included.
      forest: the tries of the tasks with listed values, in their order.
      analytic: the tries of the other tasks, in their order.
      is_analytic: which tasks those are.
      depths: tokens of each task's longest answer, without the terminator.
      lost_mass: how much of each task's probability none of its values stands for.
      from_cache: whether prompts and tries were found in the cache.
    """

    prompts: tuple[Int32[np.ndarray, "_"], ...]
    forest: Forest
    analytic: tuple[AnalyticTrie, ...]
    is_analytic: Bool[np.ndarray, "G"]
    depths: Int64[np.ndarray, "G"]
    lost_mass: Float64[np.ndarray, "G"]
    from_cache: bool

    def statistics(self) -> dict[str, int]:
        """Counts and size: `prompts`, and of the listed tries `values`, `prefixes`, `max_children` and `bytes`."""
        arrays = self.forest.arrays
        return {
            "prompts": len(self.prompts),
            "values": arrays["leaf_prefix"].size,
            "prefixes": arrays["token"].size,
            "max_children": int(np.diff(arrays["child_offsets"]).max(initial=0)),
            "bytes": sum(array.nbytes for array in arrays.values()) + sum(prompt.nbytes for prompt in self.prompts),
        }


def prepare(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], data: DataConfig) -> Prepared:
    """Encodes the prompts of tasks and builds their tries, or takes both from the cache.

    Args:
      tokenizer: of the model.
      tasks: the tasks.
      data: how to discretise families, write prompts and end answers, and where the cache is.

    Raises:
      UserError: the tokenizer has no chat template or terminator, a prompt with its longest answer is longer than
        `data.max_length`, values of a task cannot be told apart by their tokens, or the cache cannot be written.
    """
    end = terminator_id(tokenizer, data.terminator)
    is_analytic = np.array([data.space == "full" and task.space is None for task in tasks], dtype=bool)
    analytic = _analytic_tries(tokenizer, list(itertools.compress(tasks, is_analytic)), data, end)
    root = Path(data.cache_dir).expanduser() if data.cache_dir else user_cache("data")
    key = cache.key_of(_content(tokenizer, tasks, data, end))
    arrays = cache.load(root, key)
    from_cache = arrays is not None
    if arrays is None:
        arrays = cache.store(root, key, _pieces(tokenizer, tasks, is_analytic, data, end))
    prompts = tuple(np.split(arrays["prompt_ids"], arrays["prompt_counts"].cumsum()[:-1])) if len(tasks) else ()
    forest = Forest(
        {name: arrays[name] for name in ARRAYS},
        prefix_starts=np.append(0, arrays["prefix_counts"].cumsum()),
        child_starts=np.append(0, arrays["child_counts"].cumsum()),
        leaf_starts=np.append(0, arrays["leaf_counts"].cumsum()),
        terminator_id=end,
    )
    depths = np.empty(len(tasks), dtype=np.int64)
    depths[~is_analytic] = [forest.trie(index).max_depth for index in range(len(forest))]
    # The longest number is one of the ends.
    depths[is_analytic] = [trie.encode(np.array([trie.space.first, trie.space.last]))[1].max() for trie in analytic]
    check_lengths(tasks, prompts, depths.tolist(), data.max_length)
    lost_mass = np.zeros(len(tasks))
    lost_mass[~is_analytic] = arrays["lost_mass"]
    return Prepared(prompts, forest, analytic, is_analytic, depths, lost_mass, from_cache)


def check_lengths(
    tasks: Sequence[Task], prompts: Sequence[Int32[np.ndarray, "_"]], depths: Sequence[int], max_length: int
) -> None:
    """Checks that every prompt with its longest answer, the terminator included, fits.

    Raises:
      UserError: naming the longest of those that do not.
    """
    lengths = [prompt.size + depth + 1 for prompt, depth in zip(prompts, depths, strict=True)]
    too_long = sum(length > max_length for length in lengths)
    if too_long:
        worst = int(np.argmax(lengths))
        raise UserError(
            f"task {tasks[worst].task_id}: prompt and answer are up to {lengths[worst]} tokens long, more than "
            f"config.data.max_length={max_length} ({too_long} of {len(tasks)} tasks); raise it or shorten the prompt"
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], data: DataConfig
) -> list[Int32[np.ndarray, "_"]]:
    """Token ids of the tasks' prompts, the generation prompt included.

    Raises:
      UserError: see `encode_chats`.
    """
    encoded = encode_chats(tokenizer, [task.messages for task in tasks], ChatOptions.from_config(data))
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def _analytic_tries(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], data: DataConfig, end: int
) -> tuple[AnalyticTrie, ...]:
    if not tasks:
        return ()
    tokens = NumberTokens(digit_tokens(tokenizer), end)
    spaces = [task_space(task, data) for task in tasks]
    return tuple(AnalyticTrie(space, tokens) for space in spaces if isinstance(space, AnalyticSpace))


def _pieces(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], is_analytic: np.ndarray, data: DataConfig, end: int
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of an entry: first the prompts, then the listed tries of a few tasks at a time."""
    prompts = encode_prompts(tokenizer, tasks, data)
    yield {
        **{name: np.empty(0, dtype=kind) for name, kind in ARRAYS.items()},
        **{f"{name}_counts": np.empty(0, dtype=np.int64) for name in ("prefix", "child", "leaf")},
        "lost_mass": np.empty(0),
        "prompt_ids": np.concatenate([np.empty(0, dtype=np.int32), *prompts]),
        "prompt_counts": np.array([prompt.size for prompt in prompts], dtype=np.int64),
    }
    listed = list(itertools.compress(tasks, ~is_analytic))
    encoder = ValueEncoder(tokenizer)
    with Progress("build tries", total=len(listed), unit="prompt") as progress:
        for first in range(0, len(listed), _TASKS_AT_ONCE):
            some = listed[first : first + _TASKS_AT_ONCE]
            spaces = [space for task in some if not isinstance(space := task_space(task, data), AnalyticSpace)]
            forest = listed_forest(encoder, spaces, [task.task_id for task in some], end)
            yield {
                **forest.arrays,
                "prefix_counts": np.diff(forest.prefix_starts),
                "child_counts": np.diff(forest.child_starts),
                "leaf_counts": np.diff(forest.leaf_starts),
                "lost_mass": np.array([space.lost_mass for space in spaces]),
            }
            progress.advance(len(some))


def _content(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], data: DataConfig, end: int
) -> dict[str, object]:
    """Everything that shapes an entry."""
    settings = dataclasses.asdict(data)
    shaping = ("space", "num_decimals", "max_bins", "quantile_low", "quantile_high", "tail_policy", "full_quantile")
    return {
        "code": _code_digest(),
        "tokenizer": fingerprint(tokenizer),
        "terminator": end,
        "chat": dataclasses.asdict(ChatOptions.from_config(data)),
        "data": {name: settings[name] for name in shaping},
        "tasks": digest_of_tasks(tasks),
    }


def _code_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(path for name in _CODE for path in (package / name).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
