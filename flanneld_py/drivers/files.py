"""Sysctls and files, and the one way in which we replace a file."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flanneld_py.model import Op, Outcome, Scope, State, Table

PROC_SYS = Path("/proc/sys")
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}")
"""What is written before it takes the name of a file; a process that is killed may leave one."""


class HostFiles:
    """Driver of the tables sysctls and files."""

    tables: tuple[Table, ...] = ("sysctls", "files")

    def observe(self, scope: Scope) -> State:
        """Only what the scope names is read; what cannot be read is left out, and writing it says why."""
        sysctls = {name: _readable(PROC_SYS / name) for name in scope.sysctls}
        files = {path: _readable(Path(path)) for path in scope.files}
        return State(
            sysctls={name: text.strip() for name, text in sysctls.items() if text is not None},
            files={path: text for path, text in files.items() if text is not None},
        )

    def apply(self, ops: Sequence[Op]) -> Sequence[Outcome]:
        carry_out = {"sysctls": _apply_sysctl, "files": _apply_file}
        return [Outcome(op, carry_out[op.table](op)) for op in ops]


def _apply_sysctl(op: Op) -> str | None:
    if op.verb == "del":
        return None  # a sysctl cannot be deleted; it goes with its device
    path = PROC_SYS / op.key
    try:
        path.write_bytes(op.value.encode())
    except OSError as error:
        return f"cannot write {op.value!r} to {path}: {_reason(error)}"
    return None


def _apply_file(op: Op) -> str | None:
    path = Path(op.key)
    try:
        if op.verb == "set":
            write_atomically(path, op.value)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return f"cannot {'write' if op.verb == 'set' else 'delete'} {path}: {_reason(error)}"
    return None


def _reason(error: OSError) -> str:
    """In words, as the kernel drivers say it: `No space left on device (ENOSPC)`."""
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"


def _readable(path: Path) -> str | None:
    try:
        return read_text(path)
    except OSError:
        return None


def read_text(path: Path) -> str | None:
    r"""The text of a file as it stands (`\r\n` stays), None when there is none.

    Raises:
        OSError: it is there but cannot be read.
    """
    try:
        # A FIFO in its place must not make us wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode(errors="backslashreplace")


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Put a text in the place of a file, so that every reader sees the old one or the new one, whole.

    Args:
        path: the file; missing folders above it are made with mode 0755.
        text: its content.
        mode: permission bits of a new file, whatever the umask; a file that stands keeps its own.

    Raises:
        OSError: the old file is intact, and nothing else is left behind.
    """
    _make_parents(path.parent)
    with suppress(FileNotFoundError):
        standing = path.lstat()
        if stat.S_ISREG(standing.st_mode):
            mode = stat.S_IMODE(standing.st_mode)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    with temporary.open("xb") as file:
        try:
            os.fchmod(file.fileno(), mode)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what `write_atomically` leaves beside a file when it is killed. Nobody else may write it now."""
    with suppress(OSError):
        for one in path.parent.iterdir():
            if (match := TEMPORARY.fullmatch(one.name)) and match["name"] == path.name:
                one.unlink()


def _make_parents(folder: Path) -> None:
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        with suppress(FileExistsError):
            one.mkdir()
            one.chmod(0o755)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself outlast a power failure; not every file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
