"""Stands where worker.py would: becomes $SANITIZED_WORKER, with $SANITIZER_LIBRARY loaded before all else."""

from __future__ import annotations

import ctypes
import os
import sys

ADDR_NO_RANDOMIZE = 0x0040000
"""personality(2). ThreadSanitizer needs parts of the address space that newer kernels may give to others."""


def main() -> None:
    """The same process, descriptors and arguments; does not return."""
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    preloaded = os.environ | {"LD_PRELOAD": os.environ["SANITIZER_LIBRARY"]}
    argv = [sys.executable, "-I", "-S", os.environ["SANITIZED_WORKER"], *sys.argv[1:]]
    os.execve(sys.executable, argv, preloaded)  # noqa: S606 - nothing of a shell is needed


if __name__ == "__main__":
    main()
