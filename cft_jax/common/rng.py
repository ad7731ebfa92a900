"""Random keys that name what they are for: a draw depends on nothing but the run's seed and its own identity.

Batch size, padding, mesh, process and resume point never enter a key, so none of them can change a draw.
"""

import zlib

import jax
from jaxtyping import Array, Int, Key


def make_key(seed: int, purpose: str, *path: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key of one draw: seed, then what it is for, then which one of that kind.

    Args:
      seed: of the run.
      purpose: for example "dropout" or "sample"; two purposes never share draws.
      path: identity within the purpose, outermost first, for example (prompt id, sample id, token index). Numbers may
        be traced.

    Raises:
      ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return fold_in(key, *path)


def fold_in(key: Key[Array, ""], *path: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key further down the path, as `make_key` with a longer path."""
    for number in path:
        key = jax.random.fold_in(key, number)
    return key
