"""Pings by the clock, as many in any case; ping(8) slows down while nothing answers."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from flanneld_py.lab import wait_for
from flanneld_py.lab.entering import inside
from tests.netns.udp_traffic import ones_sum

if TYPE_CHECKING:
    from flanneld_py.lab import Host

INTERVAL = 0.001
"""Seconds."""
LATE = 2.0
"""Seconds after the last one, in which answers still count."""
SO_RCVBUFFORCE = 33
ECHO = 8
IDENTIFIER = 0x4242


class SteadyPings:
    """From a host's pod to another's, in a thread, until the context ends; answered when this is there."""

    def __init__(self, source: Host, target: Host, interval: float = INTERVAL) -> None:
        with inside(source.pod):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        # After a gap all answers come at once.
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        self._socket.connect((target.pod.address, 0))
        self._interval = interval
        self.sent = 0
        self._answers: dict[int, float] = {}
        """Number → when its answer came."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._ping, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.wait_more()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._socket.close()

    def wait_more(self) -> None:
        """Until another hundred were answered."""
        enough = len(self._answers) + 100
        wait_for(
            lambda: len(self._answers), 10, "answers to steady pings", lambda answered: answered >= enough
        )

    def first_answer(self, since: float) -> float:
        """When the first one came after that, on the clock of time.monotonic()."""
        return min(at for at in [*self._answers.values()] if at > since)

    def stop(self) -> tuple[int, float]:
        """End it: how many were lost, and the longest time in seconds without an answer."""
        self._stopping.set()
        self._thread.join()
        gaps = (later - earlier for earlier, later in itertools.pairwise(sorted(self._answers.values())))
        return self.sent - len(self._answers), max(gaps)

    def _ping(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            while due <= time.monotonic():
                self._send()
                due += self._interval
            self._receive(due)
        deadline = time.monotonic() + LATE
        while len(self._answers) < self.sent and time.monotonic() < deadline:
            self._receive(deadline)

    def _send(self) -> None:
        message = struct.pack(">BBHHHI", ECHO, 0, 0, IDENTIFIER, 0, self.sent)
        with suppress(OSError):  # then it is lost
            self._socket.send(message[:2] + struct.pack(">H", 0xFFFF & ~ones_sum(message)) + message[4:])
        self.sent += 1

    def _receive(self, until: float) -> None:
        """One packet, if it comes in time."""
        self._socket.settimeout(max(until - time.monotonic(), 0.0001))
        with suppress(OSError):
            message = self._socket.recv(1 << 11)[20:]
            if message[0] == 0 and message[4:6] == struct.pack(">H", IDENTIFIER):
                self._answers.setdefault(struct.unpack_from(">I", message, 8)[0], time.monotonic())
