"""Traffic between two namespaces whose every byte is checked."""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from tests.netns.udp_ends import inside

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from flanneld_py.lab import Pod
    from flanneld_py.lab.netns import Namespace

IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
SO_RCVBUFFORCE = 33
WINDOW = 32
LARGE_BUFFER = 8 << 20
LOST_AFTER = 5.0
"""Seconds without a packet."""


def ones_sum(data: bytes) -> int:
    """RFC 1071, word by word."""
    data += b"\0" * (len(data) % 2)
    words: tuple[int, ...] = struct.unpack(f">{len(data) // 2}H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _echo(sequence: int, payload: bytes) -> bytes:
    message = struct.pack(">BBHHH", 8, 0, 0, 0x4242, sequence) + payload
    return message[:2] + struct.pack(">H", 0xFFFF & ~ones_sum(message)) + message[4:]


def echo_every_size(source: Pod, target: Pod, sizes: Sequence[int]) -> set[int]:
    """Sizes of whole IPv4 packets with DF whose echo did not come back as it was sent."""
    with inside(source):
        pinger = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with pinger:
        pinger.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        pinger.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, LARGE_BUFFER)
        pinger.settimeout(LOST_AFTER)
        content = random.Random(len(sizes)).randbytes(65536)
        waiting: dict[int, bytes] = {}
        todo = list(sizes)
        while todo or waiting:
            while todo and len(waiting) < WINDOW:
                size = todo.pop()
                waiting[size] = content[size : 2 * size - 28]
                pinger.sendto(_echo(size, waiting[size]), (target.address, 0))
            try:
                answer = pinger.recv(65536)[20:]
            except TimeoutError:
                break
            kind, _, _, identifier, size = struct.unpack_from(">BBHHH", answer)
            if (kind, identifier) == (0, 0x4242) and waiting.get(size) == answer[8:]:
                del waiting[size]
    return {*waiting, *todo}


def odd_sizes(mtu: int, seed: int) -> list[int]:
    """UDP payloads: runs of equal size, each with a shorter end, and single ones."""
    dice = random.Random(seed)
    sizes: list[int] = []
    while len(sizes) < 1000:
        size = dice.choice([1, 2, 18, 64, 511, 1200, mtu - 28, dice.randint(1, mtu - 28)])
        sizes += [size] * dice.choice([1, 1, 2, 3, 17, 64, 70])
        if dice.random() < 0.5:
            sizes.append(dice.randint(1, size))
    return sizes


def burst(source: Pod, target: Pod, sizes: Collection[int], pause: int = 100) -> None:
    """Datagrams of these sizes arrive as they were sent, in order. After `pause` the receiver catches up.

    Raises:
        AssertionError: one is missing, another, or in another place.
    """
    dice = random.Random(1)
    payloads = [dice.randbytes(size) for size in sizes]
    with inside(target):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(source):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, LARGE_BUFFER)
        receiver.settimeout(LOST_AFTER)
        receiver.bind((target.address, 0))
        sender.connect(receiver.getsockname())
        for begin in range(0, len(payloads), pause):
            group = payloads[begin : begin + pause]
            for payload in group:
                sender.send(payload)
            received = [receiver.recv(65536) for _ in group]
            assert list(map(len, received)) == list(map(len, group))
            assert received == group


def super_datagrams(source: Pod, target: Pod, size: int, packets: int) -> None:
    """What one send with UDP_SEGMENT says, as QUIC servers use it, arrives datagram by datagram."""
    payload = random.Random(size).randbytes(size * packets - 1)
    with inside(target):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(source):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.settimeout(LOST_AFTER)
        receiver.bind((target.address, 0))
        control = [(socket.SOL_UDP, 103, struct.pack("H", size))]
        sender.sendmsg([payload], control, 0, receiver.getsockname())
        received = [receiver.recv(65536) for _ in range(packets)]
    assert [len(datagram) for datagram in received] == [*[size] * (packets - 1), size - 1]
    assert b"".join(received) == payload


def send_raw(namespace: Namespace, packet: bytes, target: str) -> None:
    """An IPv4 packet with a header of its own."""
    with inside(namespace), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(packet, (target, 0))


class IcmpErrors:
    """ICMP errors that arrive in a namespace while this is open."""

    def __init__(self, namespace: Namespace) -> None:
        with inside(namespace):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

    def next(self, timeout: float = 3) -> tuple[str, int, int, int, bytes]:
        """Source, type, code, MTU field, what it quotes.

        Raises:
            TimeoutError: none came.
        """
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0 and select.select([self._socket], [], [], left)[0]:
            packet, (source, _) = self._socket.recvfrom(65536)
            kind, code, _, _, mtu = struct.unpack_from(">BBHHH", packet, 20)
            if kind in {3, 11}:
                return source, kind, code, mtu, packet[28:]
        raise TimeoutError

    def close(self) -> None:
        self._socket.close()
