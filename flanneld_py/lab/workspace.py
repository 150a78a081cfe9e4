"""One lab's files and processes: all below one directory, all gone afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from flanneld_py.lab.process import Process, environment, marked, run
from flanneld_py.lab.waiting import wait_for

DISK = Path(tempfile.gettempdir())
MEMORY = Path("/dev/shm")  # noqa: S108 - below it a directory only root can enter, as mkdtemp makes it
_PREFIX = "flanneld-py-lab"
_NAME = re.compile(rf"{_PREFIX}\.(\d+)\.\w+")
_ETCD_PREALLOCATES = 256 << 20
"""Two write-ahead logs of 64 MiB, and room to grow."""


class Workspace:
    """Files, processes and nothing else; `close()` or the end of this process removes them.

    The files outlive a SIGKILL; the next workspace, of whatever process, sweeps them.
    """

    def __init__(self) -> None:
        sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}.{os.getpid()}.", dir=DISK))
        self._directories = [self.directory]
        if _free_bytes(MEMORY) >= _ETCD_PREALLOCATES:
            (MEMORY / self.directory.name).mkdir(mode=0o700)
            self._directories.append(MEMORY / self.directory.name)
        self._locks = [_lock(path) for path in self._directories]
        self._processes: list[Process] = []
        self._numbers = itertools.count(1)

    @property
    def fast_directory(self) -> Path:
        """Where a flush to disk costs nothing, if this machine has such a place."""
        return self._directories[-1]

    @property
    def in_memory(self) -> bool:
        return len(self._directories) > 1

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        output: Path | None = None,
    ) -> Process:
        """Start a command in the background.

        Args:
            name: for messages and for the names of its output files.
            argv: the command.
            env: variables in addition to the lab's own.
            stdin: as subprocess.Popen takes it.
            output: one file for standard output and error; two files of our own when not given.
        """
        stem = f"{next(self._numbers):03}-{name}"
        process = Process(
            name,
            argv,
            env=environment(self.directory, env),
            stdin=stdin,
            stdout=output or self.directory / f"{stem}.out",
            stderr=output or self.directory / f"{stem}.err",
        )
        self._processes.append(process)
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        text: str = "",
        timeout: float = 20,
    ) -> str:
        """Run a command to its end and return its standard output; raises CommandFailed."""
        return run(argv, environment(self.directory, env), text, timeout)

    def discard(self, process: Process) -> None:
        """End a process with SIGKILL and forget it."""
        process.kill()
        if process in self._processes:
            self._processes.remove(process)

    def kill(self, keep: Collection[int] = ()) -> None:
        """End every process started here but those with a pid in `keep`, last ones first."""
        for process in [process for process in reversed(self._processes) if process.pid not in keep]:
            self.discard(process)

    def close(self) -> None:
        """End every process and remove every file. Safe to call twice."""
        self.kill()
        _end_all(self.directory)  # children of children
        for path in self._directories:
            shutil.rmtree(path, ignore_errors=True)
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()


def directories() -> list[Path]:
    """The directories of all labs on this machine, alive or not."""
    bases = dict.fromkeys((DISK, MEMORY))
    return sorted(path for base in bases for path in base.glob(f"{_PREFIX}.*") if _NAME.fullmatch(path.name))


def sweep() -> list[Path]:
    """Remove what labs left whose process is gone (SIGKILL, power); returns what was removed."""
    swept = []
    for path in directories():
        match = _NAME.fullmatch(path.name)
        if match is None or Path("/proc", match[1]).exists() or not _is_ours(path):
            continue
        try:
            lock = _lock(path)
        except OSError:  # held by a lab in another pid namespace, or just swept by another one
            continue
        _end_all(path)
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        swept.append(path)
    return swept


def _lock(path: Path) -> int:
    """An flock(2) on a directory; it ends with the process, and children do not inherit it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid() and not path.is_symlink()
    except OSError:
        return False


def _end_all(directory: Path) -> None:
    """Kill what bears the mark of a lab, including what is forked while we look."""

    def kill() -> list[int]:
        pids = marked(directory)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    wait_for(kill, 10, f"the processes of {directory} to end", lambda pids: not pids)


def _free_bytes(path: Path) -> int:
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize if os.access(path, os.W_OK) else 0
