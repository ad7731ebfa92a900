"""The C library's allocator, set for programs that take and free the same large buffers all the time."""

import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep up to 2 GiB of freed memory instead of handing it back to the system after every use.

    On CPUs, XLA takes a fresh buffer for each step; unless it is kept, the system maps and clears every page of it
    again: 30 % of the demo's training time. One arena, because only the main one can keep so much. To be called before
    any other thread is started; does nothing under other C libraries.

    Returns:
      Whether it took effect.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST))
    return all([bool(mallopt(parameter, value)) for parameter, value in settings])
