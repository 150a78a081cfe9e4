"""How often Python looks for objects that only refer to each other. Hardly anything here does.

By default it looks at all objects several times while the first ten thousand records are read, which takes a
third of a second, and now and then ever after.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

STARTING = 200_000
"""Objects made and not yet released until the next look, while everything that comes is to stay."""
FOR_EACH = 100
"""Objects that a record may need until the first pass is over: with what is planned and read back for it."""
SETTLED = 10_000
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""malloc.h of glibc: from what size on memory is given back by itself, and how many heaps there are.

A heap for each thread only scatters what is freed, as threads of Python do not run at the same time.
"""
LARGE = 128 << 10


def begin() -> None:
    """Hardly look until the first pass is over."""
    gc.set_threshold(STARTING, 10, 10)
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)


def expect(records: int) -> None:
    """Until the first pass is over, do not look at what so many records need; later this changes nothing."""
    if gc.get_threshold()[0] >= STARTING:
        gc.set_threshold(max(STARTING, FOR_EACH * records), 10, 10)


def settle() -> None:
    """What there is now mostly stays: look at what comes from now on. Give back what a start has needed."""
    gc.freeze()
    gc.set_threshold(SETTLED, 10, 10)
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
