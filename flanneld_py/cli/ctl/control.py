"""What a daemon tells: over its control socket, and in the status file that outlives it."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

from flanneld_py.daemon.oldfiles import read_regular
from flanneld_py.errors import FlanneldError

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 8.0
"""Longer than the daemon allows itself (daemon/control.py), so that it is the one to say what is late."""

START = "start flanneld-py, or name its --subnet-file"
HANGS = "the daemon hangs or is stopped: see its log, or restart it"
LONGEST_ANSWER = 1 << 26
"""Bytes."""


class NoAnswer(FlanneldError):
    """No daemon answers on its socket; `str()` says why in a few words."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.advice = advice
        """What to do about it."""

    @property
    def with_advice(self) -> FlanneldError:
        """The same for a command that needs the answer."""
        return FlanneldError(f"no daemon to ask: {self}; {self.advice}")


def ask(path: Path, op: str, seconds: float = ANSWER_SECONDS) -> Any:
    """The `result` of a request such as `status` or `plan`, which may take some seconds.

    Raises:
        NoAnswer: there is no daemon, or it hangs, or we may not ask it.
        FlanneldError: the daemon answered that it cannot.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            _connect(connection, path, min(CONNECT_SECONDS, seconds))
            connection.settimeout(seconds)
            connection.sendall(json.dumps({"op": op}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline(LONGEST_ANSWER)
    except (TimeoutError, BlockingIOError):
        raise NoAnswer(f"{path}: no answer in time", HANGS) from None
    except PermissionError:
        raise NoAnswer(f"{path}: permission denied", "ask as root") from None
    except OSError as error:
        raise NoAnswer(f"{path}: {error.strerror or error}", START) from None
    return _result(path, line)


def _connect(connection: socket.socket, path: Path, seconds: float) -> None:
    """Wait for a place among those who ask.

    A timeout of Python's would make the socket non-blocking, and unix(7) then refuses at once what finds the
    backlog full.
    """
    whole, rest = divmod(seconds, 1)
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(rest * 1e6))
    )
    connection.connect(str(path))


def _result(path: Path, line: bytes) -> Any:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and "result" in answer:
        return answer["result"]
    if isinstance(answer, dict) and "error" in answer:
        raise FlanneldError(f"the daemon says: {answer['error']}")
    raise NoAnswer(f"{path}: the answer broke off", "ask again, as the daemon may just be ending")


def read_status_file(path: Path) -> dict[str, Any] | None:
    """The status that a daemon wrote last; None when there is none, or none that can be read."""
    try:
        status = json.loads(read_regular(path) or "")
    except (OSError, ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) else None
