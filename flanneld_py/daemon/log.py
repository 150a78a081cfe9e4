"""Logs: one event a line on stderr; JSON unless a person is looking."""

from __future__ import annotations

import os
import select
import socket
import stat
from contextlib import suppress

import structlog

DEBUG, INFO = 10, 20
STDERR = 2
CHUNK = select.PIPE_BUF
"""What is polled as writable takes this much at once (pipe(7), "PIPE_BUF")."""


class Output:
    """Lines to a file descriptor, for which nobody ever waits and which never fail.

    A reader that is gone or stuck, or a full disk, costs the lines it does not take, and nothing else.
    """

    def __init__(self, fd: int = STDERR) -> None:
        self.dropped = 0
        """Lines lost since the last one that was written."""
        self._rest = b""
        """Of the last line, what the reader did not take yet: without it the next one were broken as well."""
        self._fd = fd
        self._socket: socket.socket | None = None
        self._never_waits = False
        with suppress(OSError):
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode):
                # O_NONBLOCK belongs to the open file, which others share with us: so open it once more.
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._fd = os.open(f"/proc/self/fd/{fd}", flags)
                self._never_waits = True
            elif stat.S_ISSOCK(mode):
                self._socket = socket.socket(fileno=os.dup(fd))
                self._never_waits = True

    def write(self, text: str) -> None:
        """Write whole lines, or drop them."""
        try:
            self._rest = self._write(self._rest)
            if self._rest:
                self.dropped += 1
                return
            line = text.encode(errors="backslashreplace")
            rest = self._write(line)
            if rest == line:
                self.dropped += 1
            else:
                self.dropped, self._rest = 0, rest
        except (OSError, ValueError):
            self.dropped += 1

    def flush(self) -> None:
        """Nothing is kept back that could be written."""

    def _write(self, data: bytes) -> bytes:
        """What is left of it."""
        while data and (self._never_waits or self._takes()):
            try:
                data = data[self._send(data[:CHUNK]) :]
            except BlockingIOError:
                break
        return data

    def _takes(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        # An error shows when writing.
        return bool(poll.poll(0))

    def _send(self, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._fd, data)


def configure(verbosity: int) -> None:
    """Set up structlog for this process; `verbosity` above 0 adds debug events."""
    output = Output()

    def tell_dropped(
        _logger: object, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        return {**event, "dropped_before": output.dropped} if output.dropped else event

    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(timestamp_key="ts", sort_keys=False)
        if os.isatty(STDERR)
        else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            tell_dropped,
            _first_things_first,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(DEBUG if verbosity > 0 else INFO),
        logger_factory=structlog.WriteLoggerFactory(file=output),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )


def _first_things_first(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Time, level, part and event begin each line; the event's own fields follow."""
    head = {name: event.pop(name) for name in ("ts", "level", "part", "event") if name in event}
    return {**head, **event}
