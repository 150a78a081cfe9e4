"""The thread behind flannelctl: answers `status` and `plan` on a unix socket, a JSON line each way."""

from __future__ import annotations

import json
import os
import selectors
import socket
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from msgspec import Struct, field

from flanneld_py.daemon.inbox import boottime
from flanneld_py.errors import FlanneldError

TIMEOUT = 5.0
"""Seconds for a client to send its line, and for the answer to be ready."""
SEND_TIMEOUT = 1.0
LONGEST_REQUEST = 4096
MOST_CLIENTS = 32
"""The oldest makes room for the next."""
RETRY = 1.0
CHECK = 5.0
"""Seconds between looks whether the socket is still in its place."""

Answer = Callable[[], Any]


class _Client(Struct):
    """A connection whose request is not whole yet. Nobody waits for it."""

    connection: socket.socket
    until: float
    request: bytes = b""


class _Listener(Struct):
    """Our socket, and which file it is."""

    socket: socket.socket
    file: tuple[int, int] = field(default=(0, 0))
    """Device and inode."""


class Control:
    """A listening socket, mode 0600: whoever may read it may see the status."""

    def __init__(
        self, path: Path, answers: Mapping[str, Answer], beat: Callable[[], None] = lambda: None
    ) -> None:
        """`beat` is called often, to show that the thread does not hang."""
        self._answers = answers
        self._beat = beat
        self._path = path
        self._log = structlog.get_logger().bind(part="control")
        self._stopped = False
        self._placing = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._listener: _Listener | None = None
        self._clients: dict[int, _Client] = {}
        self._told = ""
        self._error = self._listen()

    def run(self) -> None:
        """Until `stop`. The network does not depend on it: where it cannot listen it tries again."""
        while not self._stopped:
            self._beat()
            if not self._in_place():
                self._error = self._listen()
                if self._error and self._error != self._told:
                    self._log.warning("control_unavailable", path=str(self._path), error=self._error)
                self._told = self._error
            for key, _ in self._selector.select(self._patience()):
                self._serve(key.fd)
            self._drop_late_ones()
        self._close()

    def check(self) -> None:
        """Look now whether the socket is still in its place."""
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        with self._placing:
            self._stopped = True
            if self._listener is not None:
                with suppress(OSError):
                    self._path.unlink()
        self.check()

    def _patience(self) -> float:
        if self._error:
            return RETRY
        return min([CHECK, *(max(0.0, one.until - boottime()) for one in self._clients.values())])

    # --- the socket file ---

    def _in_place(self) -> bool:
        if self._listener is None:
            return False
        try:
            return _file_of(self._path) == self._listener.file
        except OSError:
            return False

    def _listen(self) -> str:
        """Why it could not, or nothing."""
        with self._placing:
            if self._stopped:
                return ""
            try:
                listener = _Listener(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            except OSError as error:
                return error.strerror or str(error)
            try:
                self._place(listener)
            except OSError as error:
                listener.socket.close()
                return error.strerror or str(error)
            self._forget_listener()
            self._listener = listener
            self._selector.register(listener.socket, selectors.EVENT_READ)
        return ""

    def _place(self, listener: _Listener) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The lock of our subnet file is held: a socket that lies there is a dead daemon's.
        self._path.unlink(missing_ok=True)
        listener.socket.bind(str(self._path))
        self._path.chmod(0o600)
        listener.file = _file_of(self._path)
        listener.socket.setblocking(False)
        listener.socket.listen(MOST_CLIENTS)

    def _forget_listener(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener.socket)
            self._listener.socket.close()
            self._listener = None

    def _close(self) -> None:
        for number in list(self._clients):
            self._forget(number)
        self._forget_listener()
        self._selector.close()

    # --- clients ---

    def _serve(self, number: int) -> None:
        if number in self._clients:
            self._read(number)
        elif self._listener is not None and number == self._listener.socket.fileno():
            self._accept(self._listener.socket)
        else:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it left again
        except OSError as error:
            # EMFILE and its like, at which the socket stays readable: that would be a busy loop.
            self._log.debug("control_client_refused", error=error.strerror)
            self._selector.unregister(listener)
            self._selector.select(RETRY)
            self._selector.register(listener, selectors.EVENT_READ)
            return
        if len(self._clients) >= MOST_CLIENTS:
            self._forget(next(iter(self._clients)))
        connection.setblocking(False)
        self._clients[connection.fileno()] = _Client(connection, boottime() + TIMEOUT)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, number: int) -> None:
        client = self._clients[number]
        try:
            part = client.connection.recv(LONGEST_REQUEST)
            client.request += part
            if part and b"\n" not in client.request and len(client.request) < LONGEST_REQUEST:
                return
            client.connection.settimeout(SEND_TIMEOUT)
            reply = self._reply(client.request.partition(b"\n")[0])
            client.connection.sendall(json.dumps(reply).encode() + b"\n")
        except BlockingIOError:
            return
        except OSError as error:
            self._log.debug("control_client_lost", error=str(error))
        self._forget(number)

    def _drop_late_ones(self) -> None:
        for number in [number for number, client in self._clients.items() if client.until <= boottime()]:
            self._forget(number)

    def _forget(self, number: int) -> None:
        client = self._clients.pop(number)
        self._selector.unregister(client.connection)
        client.connection.close()

    def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            op = json.loads(line)["op"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": 'the request must be one line of JSON such as {"op":"status"}'}
        answer = self._answers.get(op) if isinstance(op, str) else None
        if answer is None:
            return {"error": f"op {op!r}: one of {', '.join(self._answers)} was expected"}
        try:
            result = answer()
            return {"result": result.result(TIMEOUT) if isinstance(result, Future) else result}
        except TimeoutError:
            return {"error": f"the daemon did not answer {op!r} within {TIMEOUT:.0f} s: it is busy or stuck"}
        except (FlanneldError, OSError) as error:
            return {"error": str(error)}


def _file_of(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else (0, 0)
