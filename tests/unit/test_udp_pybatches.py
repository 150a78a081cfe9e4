"""Batches of the pure Python pump in the middle of which the kernel refuses something."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from contextlib import ExitStack
from ipaddress import IPv4Address, ip_network
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from flanneld_py.addresses import PerFamily
from flanneld_py.udp import pycounts, pypump, pysend
from flanneld_py.udp.pyreceive import Receiver
from flanneld_py.udp.pysend import Sender
from flanneld_py.udp.pytable import Table
from flanneld_py.udp.table import Here, Peer, pack
from tests.netns.udp_packets import ipv4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VNET = bytes(10)
PEERS = ("127.0.0.2", "127.0.0.3")
"""Of 10.5.2.0/24 and 10.5.3.0/24."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def counts() -> pycounts.Counts:
    return pycounts.Counts(memoryview(bytearray(8 * len(pycounts.COUNTED))).cast("Q"))


def counted(found: pycounts.Counts) -> dict[str, int]:
    return {name: number for name, number in zip(pycounts.COUNTED, found.memory, strict=True) if number}


def bound(stack: ExitStack, address: str, port: int = 0) -> socket.socket:
    udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.bind((address, port))
    udp.settimeout(5)
    return udp


def table(port: int) -> Table:
    here = Here(
        PerFamily(ip_network("10.5.1.0/24"), None),
        PerFamily(IPv4Address("10.5.1.0"), None),
        (ip_network("10.5.0.0/16"),),
        1472,
    )
    peers = [
        Peer(IPv4Address(address), (ip_network(f"10.5.{number}.0/24"),), port)
        for number, address in enumerate(PEERS, 2)
    ]
    return Table(pack(here, peers))


def a_sender(stack: ExitStack, port: int = 8285) -> Sender:
    sender = Sender(-1, [bound(stack, "127.0.0.1")], counts(), udp_segment=True)
    for raw in sender._icmp.values():
        stack.callback(raw.close)
    sender.set_table(table(port))
    return sender


def reads(monkeypatch: pytest.MonkeyPatch, *script: bytes | OSError) -> None:
    """What the TUN gives, one by one."""
    left = list(script)

    def preadv(_: int, buffers: list[memoryview], *__: int) -> int:
        step = left.pop(0)
        if isinstance(step, OSError):
            raise step
        data = VNET + step
        buffers[0][: len(data)] = data
        return len(data)

    monkeypatch.setattr(os, "preadv", preadv)


def test_a_read_that_fails_changes_no_packet_in_hand(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not sent yet lay in buffers that the next batch filled, and went to the host before."""
    first = bound(stack, PEERS[0])
    port = first.getsockname()[1]
    second = bound(stack, PEERS[1], port)
    sender = a_sender(stack, port)
    to_first, to_second = ipv4("10.5.1.9", "10.5.2.9", b"first"), ipv4("10.5.1.9", "10.5.3.9", b"other")
    reads(monkeypatch, to_first, OSError(errno.EINVAL, "refused"), to_second, BlockingIOError())
    with pytest.raises(OSError, match="refused"):
        sender.batch()
    sender.batch()
    assert first.recv(100)[20:] == b"first"
    assert second.recv(100)[20:] == b"other"
    assert not select.select([first, second], [], [], 0)[0]


class Refusing(socket.socket):
    """Its third read fails."""

    reads = 0

    def recvmsg_into(self, *arguments: object) -> object:  # type: ignore[override]
        self.reads += 1
        if self.reads == 3:
            raise OSError(errno.ENOMEM, "refused")
        return super().recvmsg_into(*arguments)  # type: ignore[arg-type]


def test_a_read_that_fails_costs_no_packet_received_before(stack: ExitStack) -> None:
    udp = stack.enter_context(Refusing(socket.AF_INET, socket.SOCK_DGRAM))
    udp.bind(("127.0.0.1", 0))
    out, tun = os.pipe2(os.O_DIRECT)  # a write is a packet
    stack.callback(os.close, out)
    stack.callback(os.close, tun)
    found = counts()
    receiver = Receiver(tun, udp, found, join_tcp=True, join_udp=True)
    peer = bound(stack, PEERS[0])
    receiver.set_table(table(8285))
    for payload in (b"one", b"two", b"three"):
        peer.sendto(ipv4("10.5.2.9", "10.5.1.9", payload), udp.getsockname())
    with pytest.raises(OSError, match="refused"):
        receiver.batch()
    assert [os.read(out, 100)[30:] for _ in range(2)] == [b"one", b"two"]
    receiver.batch()
    assert os.read(out, 100)[30:] == b"three"
    assert counted(found)["packets"] == 3


def test_a_batch_ends_after_some_milliseconds(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon is answered between two."""
    taken = []
    packet = ipv4("10.5.1.9", "10.5.2.9", b"x")
    reads(monkeypatch, *[packet] * pysend.PACKETS)
    sender = a_sender(stack)
    now = [100.0]

    def later(*_: object) -> None:
        taken.append(1)
        now[0] += pysend.BATCH / 2

    monkeypatch.setattr(sender, "_take", later)
    monkeypatch.setattr(pysend, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sender.batch()
    assert len(taken) == 3


class Poller:
    """Fails once."""

    def __init__(self, poller: select.poll) -> None:
        self._poller, self._fails = poller, True

    def poll(self) -> list[tuple[int, int]]:
        if self._fails:
            self._fails = False
            raise OSError(errno.ENOMEM, "no memory")
        return self._poller.poll()


def loop(
    stack: ExitStack, batch: Callable[[], None]
) -> tuple[pypump._Loop, pycounts.Counts, socket.socket, socket.socket]:
    """One, what it counts, and what its data and its control come from."""
    data, source = socket.socketpair()
    control, daemon = socket.socketpair()
    for one in (data, source, control, daemon):
        stack.enter_context(one)
    found = counts()
    made = pypump._Loop(data.fileno(), batch, found, control.fileno())
    made.start()
    return made, found, source, daemon


def test_a_poll_that_fails_is_tried_again(stack: ExitStack) -> None:
    """It was once taken for the end of the TUN device."""
    made, found, _, daemon = loop(stack, lambda: None)
    made._poller = Poller(made._poller)  # type: ignore[assignment]
    daemon.send(b"x")
    made.turn()
    assert counted(found) == {"read-errors": 1}


def test_reads_that_always_fail_end_the_pump(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypump, "FAILING", 0.1)

    def batch() -> None:
        raise OSError(errno.ENOTCONN, "not connected")

    made, found, source, _ = loop(stack, batch)
    source.send(b"x")
    raised: list[OSError] = []

    def turn() -> None:
        try:
            made.turn()
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    thread.join(5)
    assert [error.errno for error in raised] == [errno.ENOTCONN]
    assert counted(found)["read-errors"] > 1
