"""The sd_notify(3) socket that daemons of a lab report to."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from flanneld_py.lab.workspace import Workspace

_COLLECTOR = Path(__file__).with_name("notify_collector.py")
_LAUNCHER = Path(__file__).with_name("kept_launcher.py")


@dataclass(frozen=True, slots=True)
class Notification:
    """One message of a daemon; `at` on the clock of time.monotonic()."""

    at: float
    fields: dict[str, str]


class NotifySocket:
    """One datagram socket for all daemons of a lab, read by a process of its own.

    A unix datagram socket holds ten messages (net.unix.max_dgram_qlen); then its senders block or lose some.
    Nobody who merely runs in a lab shall be held up by it, so it is emptied at once, whatever the lab does.
    """

    def __init__(self, workspace: Workspace, directory: Path | None = None, *, keeps: bool = False) -> None:
        """`directory`: where the socket is to be. `keeps`: descriptors as well (FDSTORE), for one daemon."""
        self.path = (directory or workspace.directory) / "notify.sock"
        self.path.unlink(missing_ok=True)
        self._workspace = workspace
        self._keeps = keeps
        program = [sys.executable, "-I", "-S", os.fspath(_COLLECTOR), *(["keep"] if keeps else [])]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as receiver:
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            receiver.bind(os.fspath(self.path))
            self._collector = workspace.spawn("notify", program, stdin=receiver.fileno())

    @property
    def launcher(self) -> tuple[str, ...]:
        """What a command is to be started with, to get the descriptors that are kept, if any are."""
        return (sys.executable, "-I", "-S", os.fspath(_LAUNCHER), os.fspath(self.path)) if self._keeps else ()

    def close(self) -> None:
        """Let go of what is kept."""
        self._workspace.discard(self._collector)

    @property
    def pid(self) -> int:
        """Of the process that reads it."""
        return self._collector.pid

    def received(self, pid: int, since: float = 0.0) -> list[Notification]:
        """What a process has sent so far; `since` it was started, as the kernel gives pids out again."""
        text = self._collector.stdout.read_text()
        messages = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [
            Notification(at, _fields(message))
            for at, sender, message in messages
            if sender == pid and at >= since
        ]


def _fields(message: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in message.splitlines() if "=" in line)
