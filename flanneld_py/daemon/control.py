"""The thread behind flannelctl: answers `status` and `plan` on a unix socket, a JSON line each way."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from flanneld_py.errors import FlanneldError

TIMEOUT = 5.0
"""Seconds for a client to send its line, and for the answer to be ready."""
LONGEST_REQUEST = 4096
RETRY = 1.0

Answer = Callable[[], Any]


class Control:
    """A listening socket, mode 0600: whoever may read it may see the status."""

    def __init__(self, path: Path, answers: Mapping[str, Answer]) -> None:
        self._answers = answers
        self._path = path
        self._log = structlog.get_logger().bind(part="control")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._stopped = threading.Event()
        self._error = self._listen()

    def run(self) -> None:
        """Until `stop`. The network does not depend on it: where it cannot listen it tries again."""
        told = ""
        while self._error and not self._stopped.wait(RETRY if told else 0):
            if self._error != told:
                self._log.warning("control_unavailable", path=str(self._path), error=self._error)
            told = self._error
            self._error = self._listen()
        while not self._stopped.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self._serve(connection)

    def _listen(self) -> str:
        """Why it could not, or nothing."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # The lock of our prefix is held: a socket that lies there is a dead daemon's.
            self._path.unlink(missing_ok=True)
            self._socket.bind(str(self._path))
            self._path.chmod(0o600)
            self._socket.listen(8)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def stop(self) -> None:
        self._stopped.set()
        with suppress(OSError):  # what could not be bound is not there to be removed
            self._path.unlink()
        with suppress(OSError):  # nor is it connected
            # close() alone would not wake accept().
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(TIMEOUT)
        try:
            with connection.makefile("rb") as lines:
                line = lines.readline(LONGEST_REQUEST)
            connection.sendall(json.dumps(self._reply(line)).encode() + b"\n")
        except OSError as error:
            self._log.debug("control_client_lost", error=str(error))

    def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            op = json.loads(line)["op"]
        except (ValueError, KeyError, TypeError):
            return {"error": 'the request must be one line of JSON such as {"op":"status"}'}
        answer = self._answers.get(op) if isinstance(op, str) else None
        if answer is None:
            return {"error": f"op {op!r}: one of {', '.join(self._answers)} was expected"}
        try:
            result = answer()
            return {"result": result.result(TIMEOUT) if isinstance(result, Future) else result}
        except TimeoutError:
            return {"error": f"the daemon did not answer {op!r} within {TIMEOUT:.0f} s: it is busy or stuck"}
        except FlanneldError as error:
            return {"error": str(error)}
