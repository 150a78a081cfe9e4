"""UDP between pods: datagrams delivered a second, and round trips one by one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flanneld_py.lab.waiting import LabError, wait_for

if TYPE_CHECKING:
    from flanneld_py.lab.netns import Namespace
    from flanneld_py.lab.process import Process

_END = [sys.executable, "-I", "-S", str(Path(__file__).with_name("datagram_end.py"))]
_ANY = -1
_SMALL = 64


@dataclass(frozen=True, slots=True)
class Delivery:
    """Of one stream: datagrams sent and received, and the seconds from the first to the last one received."""

    sent: int
    received: int
    seconds: float

    @property
    def rate(self) -> float:
        """Datagrams received in a second."""
        return self.received / self.seconds

    @property
    def lost(self) -> float:
        """Of 1."""
        return 1 - self.received / self.sent


def datagram_stream(
    client: Namespace, server: Namespace, address: str, size: int, seconds: float
) -> Delivery:
    """As many datagrams of `size` bytes of payload as the client can send in that time.

    Raises:
        LabError: less than two arrived.
    """
    receiver, port = _listening(server, ["receive", address, str(size), str(_ANY)])
    try:
        send = ["send", address, port, str(size), f"{seconds:.2f}", str(_ANY)]
        sent = int(client.run([*_END, *send], timeout=seconds + 20))
        if receiver.wait(20):
            raise LabError(f"the receiver of datagrams failed: {receiver.output()}")
        _, received, lasted = receiver.stdout.read_text().split()
    finally:
        server.discard(receiver)
    if not float(lasted):
        raise LabError(f"{received} of {sent} datagrams of {size} bytes reached {address}")
    return Delivery(sent, int(received), float(lasted))


def round_trips(client: Namespace, server: Namespace, address: str, count: int) -> list[float]:
    """Seconds of each of `count` exchanges of a small datagram for the same, one after the other, ascending.

    Both ends are kept on processors of their own, where there are two: on one, as now and then by chance,
    they wake each other faster than over any network.

    Raises:
        LabError: more than a hundredth had no answer.
    """
    processors = sorted(os.sched_getaffinity(0))
    echo, port = _listening(server, ["echo", address, str(_SMALL), str(processors[-1])])
    try:
        ask = ["ask", address, port, str(_SMALL), str(count), str(processors[0])]
        said = client.run([*_END, *ask], timeout=30 + count / 100).split()
    finally:
        server.discard(echo)
    answered = sorted(int(nanoseconds) / 1e9 for nanoseconds in said)
    if len(answered) < count * 0.99:
        raise LabError(f"{count - len(answered)} of {count} datagrams to {address} had no answer")
    return answered


def _listening(server: Namespace, command: Sequence[str]) -> tuple[Process, str]:
    """A process and the port that it told."""
    process = server.spawn("datagrams", [*_END, *command])

    def port() -> str:
        if not process.running:
            raise LabError(f"nobody listens: {process.output().strip()}")
        return process.stdout.read_text().partition("\n")[0]

    return process, wait_for(port, 10, "a listener for datagrams")
