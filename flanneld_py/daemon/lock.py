"""One daemon per prefix and network namespace, one per state directory, one per subnet file."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from flanneld_py.core.ownership import file_lock_name, lock_name
from flanneld_py.errors import HostError


class Advice(NamedTuple):
    """What to do about a lock that another process holds."""

    prefix: str
    files: str
    """On the state directory, or the subnet file."""


FOR_A_DAEMON = Advice("stop it, or use another --etcd-prefix", "give each daemon its own")


class Locks:
    """Held until the process ends; the kernel lets go of them by itself."""

    def __init__(
        self, prefix: str, state_dir: Path, subnet_file: Path, advice: Advice = FOR_A_DAEMON
    ) -> None:
        """Take all of them; `advice` is for whoever cannot have them.

        Raises:
            HostError: another process holds one, or the state directory cannot be used.
            OSError: this process has reached a limit.
        """
        with ExitStack() as held:
            _bind(
                held,
                lock_name(prefix),
                f"another flanneld-py (or a flannelctl cleanup) works on prefix {prefix} on this host",
                advice.prefix,
            )
            held.callback(os.close, _lock_directory(state_dir, advice.files))
            # By its name, not by a lock on a file beside it, which somebody would have to remove.
            _bind(
                held,
                file_lock_name(os.path.realpath(subnet_file)),
                f"--subnet-file {subnet_file} is in use by another flanneld-py",
                advice.files,
            )
            self._held = held.pop_all()

    def release(self) -> None:
        self._held.close()


def _bind(held: ExitStack, name: str, taken: str, advice: str) -> None:
    """Bind an abstract unix socket of this name, until `held` is closed."""
    sock = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
    try:
        sock.bind(name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise HostError(f"{taken}: {_holder(name)}; {advice}") from error


def _holder(name: str) -> str:
    """Who has bound an abstract socket: anybody may, so an operator must be able to find out."""
    label = "@" + name[1:]
    owners = (_owner(f"socket:[{inode}]") for inode in _inodes(label))
    pid = next((pid for pid in owners if pid is not None), None)
    if pid is None:
        return f"{label} is held by a process that cannot be seen from here"
    comm = ""
    with suppress(OSError):
        comm = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return f"{label} is held by pid {pid} ({''.join(c if c.isprintable() else '?' for c in comm)})"


def holder_of(prefix: str) -> str:
    """Who works on a prefix on this host, `… is held by pid 77 (flanneld-py)`; empty: nobody."""
    name = lock_name(prefix)
    return _holder(name) if _inodes("@" + name[1:]) else ""


def _inodes(label: str) -> list[str]:
    """Of the unix sockets with this name."""
    try:
        rows = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    # Num RefCount Protocol Flags Type St Inode Path
    return [row[6] for line in rows if len(row := line.split(maxsplit=7)) == 8 and row[7] == label]


def _owner(link: str) -> int | None:
    """The process that has this file open (proc(5), /proc/pid/fd)."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is not for us to see
            if any(_readlink(fd) == link for fd in (process / "fd").iterdir()):
                return int(process.name)
    return None


def _readlink(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _lock_directory(state_dir: Path, advice: str) -> int:
    path = state_dir / "lock"
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = _open(path)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise HostError(
            f"--state-dir {state_dir}: {error.strerror}; expected a directory that can be written"
        ) from error
    refused = _lock(fd)
    if refused is None:
        return fd
    os.close(fd)
    # Not raised from that error: its number is that of a limit as well.
    if refused == errno.EAGAIN:
        raise HostError(f"--state-dir {state_dir} is in use by another flanneld-py; {advice}")
    raise HostError(f"--state-dir {state_dir}: cannot lock {path}: {os.strerror(refused)}")


def _open(path: Path) -> int:
    """The lock's file; on a disk that became read-only what there is, as the state in it serves all the same.

    Raises:
        OSError: there is no directory that can be used.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _lock(fd: int) -> int | None:
    """The errno of a failure."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return None
