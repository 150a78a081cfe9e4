"""sd_notify(3): telling systemd that we are ready, what we are doing, and that we do not hang."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping

import structlog

from flanneld_py.daemon.heartbeats import Heartbeats

LONGEST_INTERVAL = 10.0
"""Seconds between two signs of life, whatever systemd asks for."""
STARTING_SECONDS = 60.0
"""How much longer the start may take: it may wait for etcd, with no end, but not hang."""


MUST_BE_HEARD = ("READY", "STATUS")
"""Nothing else says it again: systemd would wait for ever, or show what is no more so."""


class Notifier:
    """Sends to $NOTIFY_SOCKET; silent where there is none."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the NUL byte of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._lock = threading.Lock()
        self._last_speaker: int | None = None
        self._owed: dict[str, str] = {}
        """Of what did not go through, as with a socket that is full, that which systemd must hear."""
        self.said_ready = False
        """Whether READY went through."""

    def send(self, **fields: str) -> None:
        """`send(READY="1", STATUS="…")`. A manager that went away is no reason to fail, nor is a limit.

        READY and STATUS that do not go through go along with what is sent next. From STOPPING on only the
        thread that said so is heard.
        """
        with self._lock:
            speaker = threading.get_ident()
            if "STOPPING" in fields:
                self._last_speaker, self._owed = speaker, {}
            if self._last_speaker in (None, speaker):
                self._send({**self._owed, **fields})

    def send_owed(self) -> None:
        """Try again what did not go through; to be called now and then."""
        if self._owed:
            self.send()

    def _send(self, fields: Mapping[str, str]) -> None:
        if self._address and not self._went_through(fields):
            self._owed = {name: fields[name] for name in MUST_BE_HEARD if name in fields}
            return
        self._owed = {}
        self.said_ready = self.said_ready or "READY" in fields

    def _went_through(self, fields: Mapping[str, str]) -> bool:
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode(errors="backslashreplace"), self._address)
        except OSError:
            return False
        return True

    def send_reloaded(self, now: float) -> None:
        """A reload, which only begins something, is over at once; `now` by time.monotonic()."""
        if self.said_ready:  # READY before its time would start what waits for it
            self.send(RELOADING="1", MONOTONIC_USEC=str(round(now * 1e6)))
            self.send(READY="1")


class Watchdog:
    """Tells systemd that the threads turn, as long as all do; what then ends us is its watchdog."""

    def __init__(self, notifier: Notifier, heartbeats: Heartbeats) -> None:
        self._notifier = notifier
        self._heartbeats = heartbeats
        self._log = structlog.get_logger().bind(part="watchdog")
        self._late: list[str] = []
        self.interval = watchdog_interval(os.environ.get("WATCHDOG_USEC", ""))
        """Seconds between two calls of `feed`."""

    def feed(self, now: float) -> None:
        """Say so if all threads beat in time; `now` by time.monotonic()."""
        late = self._heartbeats.late(now)
        if late and late != self._late:
            self._log.error("thread_hangs", threads=late)
        self._late = late
        if late:
            return
        if self._notifier.said_ready:
            self._notifier.send(WATCHDOG="1")
        else:
            microseconds = round(STARTING_SECONDS * 1e6)
            self._notifier.send(WATCHDOG="1", EXTEND_TIMEOUT_USEC=str(microseconds))


def watchdog_interval(watchdog_usec: str) -> float:
    """Seconds: half of what $WATCHDOG_USEC allows, as sd_watchdog_enabled(3) advises."""
    allowed = int(watchdog_usec) / 1e6 if watchdog_usec.isdecimal() else 0.0
    return min(allowed / 2, LONGEST_INTERVAL) if allowed else LONGEST_INTERVAL
