"""Entering a network namespace with one thread, to open there what then belongs to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.lab.netns import Namespace

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """What this thread opens and starts meanwhile belongs to the namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    target = os.open(namespace.path, os.O_RDONLY)
    try:
        _enter(target)
        try:
            yield
        finally:
            _enter(before)
    finally:
        os.close(before)
        os.close(target)
