"""The order of an epoch: balanced over families, and a function of (seed, epoch) alone.

As in the paper (arXiv 2605.11845), every round visits each family that still has items once, in a fresh random order,
so any first part of an epoch holds the families as evenly as possible.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64


def epoch_order(groups: Sequence[str], visits: int, *, seed: int, epoch: int) -> Int64[np.ndarray, "_"]:
    """The tasks of an epoch, each `visits` times.

    Args:
      groups: the family of every task.
      visits: how often an epoch visits a task; repeated tasks are shuffled like different ones.
      seed: of the run.
      epoch: from 0.

    Returns:
      len(groups) · visits task numbers. Within a family the items are shuffled; the j-th items of all families form
      round j, itself shuffled.
    """
    _, family = np.unique(np.asarray(groups), return_inverse=True)
    tasks = np.tile(np.arange(len(groups)), visits)
    family = family[tasks]
    generator = np.random.Generator(_bit_generator(seed, "order", epoch))
    shuffled = np.lexsort((generator.random(tasks.size), family))
    sizes = np.bincount(family)
    round_of_item = np.arange(tasks.size) - (np.cumsum(sizes) - sizes)[family[shuffled]]
    return tasks[shuffled[np.lexsort((generator.random(tasks.size), round_of_item))]]


def uniform_draws(first: int, count: int, *, seed: int, epoch: int) -> Float64[np.ndarray, "_"]:
    """Numbers `first` to `first + count` of an epoch's endless list of uniform draws from [0, 1).

    Any stretch can be had without the ones before, and is the same whatever stretches are asked for.
    """
    bits = _bit_generator(seed, "draws", epoch)
    # One step of Philox's counter makes four numbers.
    block, skip = divmod(first, 4)
    bits.advance(block)
    return np.random.Generator(bits).random(skip + count)[skip:]


def _bit_generator(seed: int, purpose: str, epoch: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch]))
