"""Reading files of earlier runs, in whose place anything may stand by now."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

LONGEST = 1 << 24
"""Bytes; nothing else that we write comes near."""
ASIDE = ".unusable"
"""What is added to the name of a file that is put aside."""


def read_regular(path: Path, longest: int = 0) -> str | None:
    """The text of a file, None when there is none. Never waits, unlike `open` for the writer of a FIFO.

    Raises:
        OSError: it is no regular file, cannot be read, or has more bytes than `longest` (0: LONGEST).
    """
    longest = longest or LONGEST
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(longest + 1)
    finally:
        os.close(descriptor)
    if len(data) > longest:
        raise OSError(errno.EFBIG, f"longer than {longest >> 20} MiB", str(path))
    return data.decode(errors="backslashreplace")
