"""A running flanneld-py of one host."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flanneld_py.lab.notify import Notification
from flanneld_py.lab.process import DIE_WITH_PARENT, command_line, descendants, send_signal
from flanneld_py.lab.waiting import LabError, WaitTimeout, wait_for

if TYPE_CHECKING:
    from flanneld_py.lab.hosts import Host

COMMAND: tuple[str, ...] = (sys.executable, "-m", "flanneld_py.cli.daemon")
_CHECKOUT = Path(__file__).parents[2]
_BYTECODE = _CHECKOUT / "build" / "pycache"
"""Compiled once for all daemons of all labs: compiling takes longer than everything else at start."""


def _daemon_environment(host: Host, extra: Mapping[str, str] | None) -> dict[str, str]:
    is_checkout = (_CHECKOUT / "pyproject.toml").exists()
    bytecode = _BYTECODE if is_checkout else host.workspace.directory / "pycache"
    return {
        "NOTIFY_SOCKET": os.fspath(host.manager.path),
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": os.fspath(bytecode),
        **(extra or {}),
    }


class Daemon:
    """One run of the daemon, from start to exit."""

    def __init__(
        self,
        host: Host,
        *,
        args: Sequence[str],
        env: Mapping[str, str] | None,
        wrapper: Sequence[str],
        strace: Sequence[str] | None,
        log: Path,
    ) -> None:
        self.host = host
        self.log = log
        self.argv = (*COMMAND, *host.flags, *args)
        self.trace = log.with_suffix(".strace")
        """What strace wrote, when asked to."""
        tracer: list[str] = []
        if strace is not None:
            # A tracee survives its tracer; with this it does not.
            tracer = ["strace", "-f", "-o", os.fspath(self.trace), *strace, "--", *DIE_WITH_PARENT]
        self._pid: int | None = None
        self._manager = host.manager
        self.started = time.monotonic()
        self.process = host.spawn(
            "daemon",
            [*wrapper, *tracer, *self._manager.launcher, *self.argv],
            env=_daemon_environment(host, env),
            output=log,
        )

    def _find_pid(self) -> int | None:
        """None while a wrapper has not yet executed it; LabError when it exited without our seeing it."""
        if self._pid is None:
            if not self.process.running:
                raise self._exited()
            found = (pid for pid in descendants(self.process.pid) if command_line(pid) == self.argv)
            self._pid = next(found, None)
        return self._pid

    def _exited(self) -> LabError:
        return LabError(f"{self._what} exited with {self.process.wait(1)}:\n{self.log_tail()}")

    @property
    def _what(self) -> str:
        return f"the daemon of host {self.host.name}"

    @property
    def pid(self) -> int:
        """Of the daemon itself, not of what wraps it.

        Raises:
            LabError: it has already exited.
        """
        return wait_for(self._find_pid, 5, f"{self._what} to be executed", interval=0.001) or 0

    @property
    def running(self) -> bool:
        return self.process.running

    @property
    def notifications(self) -> list[Notification]:
        """What it told the service manager so far, in order."""
        pid = self._find_pid()
        return self._manager.received(pid, since=self.started) if pid else []

    @property
    def status_texts(self) -> list[str]:
        """The STATUS= of its notifications, in order."""
        return [told.fields["STATUS"] for told in self.notifications if "STATUS" in told.fields]

    def ready_after(self) -> float | None:
        """Seconds from start to READY=1, or None so far."""
        ready = (told.at for told in self.notifications if told.fields.get("READY") == "1")
        first = next(ready, None)
        return None if first is None else first - self.started

    def wait_ready(self, timeout: float = 20) -> float:
        """Wait for READY=1 and subnet.env; seconds from start to READY=1.

        Raises:
            LabError: it exited instead, or was not ready in time; with the end of its log.
        """

        def ready() -> float | None:
            if not self.process.running:
                raise self._exited()
            return self.ready_after() if self.host.subnet_file.exists() else None

        try:
            return wait_for(ready, timeout, f"{self._what} to be ready") or 0.0
        except WaitTimeout as late:
            told = f"it said: {self.status_texts[-1:]}\nits log:\n{self.log_tail()}"
            raise LabError(f"{late}\n{told}") from None

    def wait_exit(self, timeout: float = 10) -> int:
        """The exit code (negative: the signal that ended it); LabError if it does not exit."""
        return self.process.wait(timeout)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon itself."""
        send_signal(self.pid, number)

    def kill(self) -> int:
        """SIGKILL; the exit code. Does nothing to a daemon that has exited."""
        with contextlib.suppress(LabError, ProcessLookupError):  # exited, or not executed yet
            if self.running:
                self.send_signal(signal.SIGKILL)
                return self.process.wait(10)
        return self.process.kill()

    def terminate(self, timeout: float = 10) -> int:
        """SIGTERM; the exit code. LabError if it has not exited in time."""
        if self.running:
            self.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def log_text(self) -> str:
        """Its standard output and error."""
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 50) -> str:
        """The last lines of its log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def log_lines(self) -> list[dict[str, Any]]:
        """Its log events; a line that is not JSON becomes `{"event": line}`."""
        text = self.log_text()
        return [_event(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def status(self) -> dict[str, Any]:
        """status.json as it stands; empty when there is none, or only that of the run before."""
        try:
            parsed: dict[str, Any] = json.loads(self.host.status_file.read_text())
        except FileNotFoundError:
            return {}
        pid = self._find_pid() if self.running else self._pid
        return parsed if parsed["pid"] == pid else {}


def _event(line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        return {"event": line}
    return parsed if isinstance(parsed, dict) else {"event": line}
