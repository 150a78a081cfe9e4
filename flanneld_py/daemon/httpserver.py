"""A small HTTP server for whoever watches over the daemon: few clients, none of which can keep it busy."""

from __future__ import annotations

import os
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, TypeAlias

import structlog

from flanneld_py.errors import HostError

TIMEOUT = 5.0
"""Seconds that a client may keep us waiting for its next byte."""
LONGEST_VISIT = 10.0
"""Seconds for all that a client wants: some send a byte now and then."""
MOST_CLIENTS = 16
"""The oldest makes room for the next."""
LONGEST_BODY = 1 << 16
RETRY_MILLISECONDS = 1000
PLAIN_TEXT = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """What is sent back."""

    status: HTTPStatus
    body: bytes
    content_type: str = PLAIN_TEXT


Page: TypeAlias = Callable[[str], Answer]
"""Called with the request's Accept header, empty if there is none."""


class HttpServer:
    """A listening socket; `run` is the body of its thread."""

    def __init__(self, ip: str, port: int, pages: Mapping[str, Page], flags: str) -> None:
        """Listen.

        Args:
            ip: address to listen on.
            port: TCP port.
            pages: path → what answers there, whatever the method.
            flags: how the operator said so, for the error.

        Raises:
            HostError: that address cannot be listened on.
        """
        try:
            self._server = _Server(ip, port, pages)
        except OSError as error:
            raise HostError(
                f"{flags}: cannot listen there: {error.strerror}; choose another, or stop what uses it"
            ) from error
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopped = False

    def run(self) -> None:
        """Until `stop`."""
        poll = select.poll()
        poll.register(self._server.socket, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._stopped:
            ready = poll.poll(RETRY_MILLISECONDS if self._server.has_clients else None)
            self._server.part_with_lingerers(time.monotonic())
            if ready and not self._stopped and not self._server.take():
                # EMFILE and its like, at which the socket stays readable: that would be a busy loop.
                select.select([self._wake], [], [], RETRY_MILLISECONDS / 1000)
        self._server.server_close()

    def stop(self) -> None:
        self._stopped = True
        os.eventfd_write(self._wake, 1)


class _Server(ThreadingHTTPServer):
    """A thread for each connection, of which there are few at a time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_CLIENTS
    timeout = 0

    def __init__(self, ip: str, port: int, pages: Mapping[str, Page]) -> None:
        self.address_family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self.pages = pages
        self._clients: dict[int, tuple[socket.socket, float]] = {}
        """File number → connection, and when it came, by time.monotonic()."""
        self._lock = threading.Lock()
        self._refused = False
        super().__init__((ip, port), _Handler)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Unlike HTTPServer's, it asks no name server for our name."""
        socketserver.TCPServer.server_bind(self)

    def take(self) -> bool:
        """Take a connection; whether there was one to be had."""
        self._refused = False
        self.handle_request()
        return not self._refused

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            connection, client = super().get_request()
        except (BlockingIOError, ConnectionAbortedError):
            raise
        except OSError:
            self._refused = True
            raise
        with self._lock:
            if len(self._clients) >= MOST_CLIENTS:
                _part_with(next(iter(self._clients.values()))[0])
            self._clients[connection.fileno()] = (connection, time.monotonic())
        return connection, client

    @property
    def has_clients(self) -> bool:
        return bool(self._clients)

    def part_with_lingerers(self, now: float) -> None:
        """Whose time is over, by time.monotonic()."""
        with self._lock:
            for connection, came in self._clients.values():
                if now - came > LONGEST_VISIT:
                    _part_with(connection)

    def close_request(self, request: Any) -> None:
        with self._lock:
            self._clients.pop(request.fileno(), None)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base's names
        """A client that went away, or no thread to be had: nobody else is concerned."""
        structlog.get_logger().debug("http_client_lost", part="http", exc_info=True)


def _part_with(connection: socket.socket) -> None:
    """Its thread then finds it at its end."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One request a connection (HTTP/1.0), any method."""

    server: _Server
    timeout = TIMEOUT
    server_version, sys_version = "flanneld-py", ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            there = " and ".join(self.server.pages)
            answer = Answer(HTTPStatus.NOT_FOUND, f"404 page not found; there is {there}".encode())
        else:
            answer = page(self.headers.get("Accept", ""))
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self._drain()

    def _drain(self) -> None:
        """Read the request's body: closing with some of it unread would cost the answer."""
        with suppress(OSError, ValueError):
            # To `read` a negative length is all that ever comes.
            self.rfile.read(max(0, min(int(self.headers.get("Content-Length", 0)), LONGEST_BODY)))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Nothing: a probe every few seconds is no news."""
