"""One daemon per prefix and network namespace, one per state directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from flanneld_py.core.ownership import lock_name
from flanneld_py.errors import HostError


class Locks:
    """Held until the process ends; the kernel lets go of them by itself."""

    def __init__(self, prefix: str, state_dir: Path) -> None:
        """Take both locks.

        Raises:
            HostError: another process holds one.
        """
        self._socket = _lock_prefix(prefix)
        self._file = _lock_directory(state_dir)

    def release(self) -> None:
        self._socket.close()
        os.close(self._file)


def _lock_prefix(prefix: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(lock_name(prefix))
    except OSError as error:
        sock.close()
        raise HostError(
            f"another flanneld-py (or a flannelctl cleanup) works on prefix {prefix} on this host; "
            f"stop it, or use another --etcd-prefix"
        ) from error
    return sock


def _lock_directory(state_dir: Path) -> int:
    path = state_dir / "lock"
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"--state-dir {state_dir}: {error.strerror}; make it writable or choose another"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise HostError(
            f"--state-dir {state_dir} is in use by another flanneld-py; give each daemon its own"
        ) from error
    return fd
