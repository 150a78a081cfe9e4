"""Child processes that end with the lab, however the lab ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from flanneld_py.lab.waiting import CommandFailed, LabError, wait_for

MARK = "FLANNELPY_LAB"
"""Environment variable of every child: the directory of its lab."""

DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""PR_SET_PDEATHSIG (prctl(2)) survives execve, so whatever this prefixes is killed with its parent."""

_NOT_INHERITED = ("ETCD", "FLANNELD_", "LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_")
"""Variables that would configure etcd or a daemon behind the lab's back."""


def environment(mark: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The lab's own environment without what steers etcd and daemons, plus the mark and `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
    return kept | {MARK: str(mark), "LC_ALL": "C.UTF-8", "PATH": search_path()} | dict(extra or {})


def search_path() -> str:
    """$PATH and where Debian keeps ip, bridge and sysctl, which a shell of `su` does not look at."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def marked(directory: Path) -> list[int]:
    """Pids of the living processes that belong to the lab of `directory`, parents or not."""
    mark = f"{MARK}={directory}\0".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if mark in environ.read_bytes():
                found.append(int(environ.parent.name))
    return sorted(found)


def command_line(pid: int) -> tuple[str, ...]:
    """The argv of a process; empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(part) for part in raw.split(b"\0")[:-1])


def descendants(pid: int) -> list[int]:
    """A process and all below it, nearest first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):  # it ended while we looked
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found.extend(int(child) for child in children.read_text().split())
    return found


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal; after SIGSTOP wait until every thread has stopped, as none does at once."""
    os.kill(pid, number)
    if number == signal.SIGSTOP:
        wait_for(lambda: _stopped(pid), 5, f"process {pid} to stop", interval=0.001)


def _stopped(pid: int) -> bool:
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.add(stat.read_text().rpartition(")")[2].split()[0])
    return states <= set("TtZX")


def run(argv: Sequence[str], env: Mapping[str, str], text: str, timeout: float) -> str:
    """Run a command to its end with `text` on its standard input and return its standard output.

    Raises:
        CommandFailed: exit code not 0, or not ended after `timeout` seconds.
    """
    child = subprocess.Popen(
        [*DIE_WITH_PARENT, *argv],
        env=dict(env),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with child:
        try:
            stdout, stderr = child.communicate(text, timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            stdout, stderr = child.communicate()
            raise CommandFailed(argv, f"had not ended after {timeout:g} s", stdout, stderr) from None
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise CommandFailed(argv, f"exited with {child.returncode}", stdout, stderr)
    return stdout


class Process:
    """A child running in the background, its output in two files (or one, if both are the same)."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.stdout = stdout
        self.stderr = stderr
        with stdout.open("ab") as out, stderr.open("ab") as err:
            # A session of its own: Ctrl-C on the terminal reaches the lab alone, which cleans up in order.
            self.popen = subprocess.Popen(
                [*DIE_WITH_PARENT, *argv],
                env=dict(env),
                stdin=stdin,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        if self.running:
            send_signal(self.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit code (negative: the signal that ended it).

        Raises:
            LabError: still running after `timeout` seconds.
        """
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name} (pid {self.pid}) had not ended after {timeout:g} s") from None

    def kill(self) -> int:
        """End it with SIGKILL and return the exit code."""
        self.popen.kill()
        if self.popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it had ended, with something left to read
                self.popen.stdin.close()
        return self.wait(10)

    def terminate(self, timeout: float = 10) -> int:
        """End it with SIGTERM and return the exit code."""
        self.popen.terminate()
        return self.wait(timeout)

    def output(self) -> str:
        """What it has written so far: standard output, then standard error."""
        paths = dict.fromkeys((self.stdout, self.stderr))
        return "".join(path.read_text(errors="replace") for path in paths)
