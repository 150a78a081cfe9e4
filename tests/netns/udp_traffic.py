"""Traffic between two namespaces whose every byte is checked."""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING

from flanneld_py.lab import Transfer
from flanneld_py.lab.capture import Capture
from flanneld_py.lab.entering import inside

if TYPE_CHECKING:
    from collections.abc import Collection

    from flanneld_py.lab import Host, Pod
    from flanneld_py.lab.netns import Namespace

IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2
UDP_SEGMENT = 103
SO_RCVBUFFORCE = 33
ECHO, ECHO_REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
IP_HEADER, ICMP_HEADER, UDP_HEADER = {4: 20, 6: 40}, 8, 8
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


def _echo(family: int, sequence: int, payload: bytes) -> bytes:
    message = struct.pack(">BBHHH", ECHO[family], 0, 0, 0x4242, sequence) + payload
    if family == 6:  # the kernel writes its checksum (RFC 3542, section 3.1)
        return message
    return message[:2] + struct.pack(">H", 0xFFFF & ~ones_sum(message)) + message[4:]


def _pinger(source: Pod, family: int) -> socket.socket:
    with inside(source):
        if family == 6:
            pinger = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        else:
            pinger = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    if family == 6:
        pinger.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
    else:
        pinger.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
    pinger.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, LARGE_BUFFER)
    pinger.settimeout(LOST_AFTER)
    return pinger


def echo_every_size(source: Pod, address: str, mtu: int) -> set[int]:
    """Sizes of packets with DF, from no payload to the MTU, whose echo did not come back as it was sent."""
    family = ip_address(address).version
    header = IP_HEADER[family]
    content = random.Random(mtu).randbytes(65536)
    waiting: dict[int, bytes] = {}
    todo = list(range(header + ICMP_HEADER, mtu + 1))
    with _pinger(source, family) as pinger:
        while todo or waiting:
            while todo and len(waiting) < WINDOW:
                size = todo.pop()
                waiting[size] = content[size : 2 * size - header - ICMP_HEADER]
                pinger.sendto(_echo(family, size, waiting[size]), (address, 0))
            try:
                answer = pinger.recv(65536)
            except TimeoutError:
                break
            if family == 4:
                answer = answer[20:]
            kind, _, _, identifier, size = struct.unpack_from(">BBHHH", answer)
            if (kind, identifier) == (ECHO_REPLY[family], 0x4242) and waiting.get(size) == answer[8:]:
                del waiting[size]
    return {*waiting, *todo}


def odd_sizes(most: int, seed: int) -> list[int]:
    """UDP payloads of 0 to `most` bytes: runs of equal size, each with a shorter end, and single ones."""
    dice = random.Random(seed)
    sizes: list[int] = []
    while len(sizes) < 1000:
        size = dice.choice([0, 1, 2, 18, 64, 511, 1200, most, dice.randint(1, most)])
        sizes += [size] * dice.choice([1, 1, 2, 3, 17, 64, 70])
        if dice.random() < 0.5:
            sizes.append(dice.randint(0, size))
    return sizes


def _datagrams(source: Pod, target: Pod, address: str) -> tuple[socket.socket, socket.socket]:
    """A sender, and a receiver that it is connected to."""
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    with inside(target):
        receiver = socket.socket(family, socket.SOCK_DGRAM)
    with inside(source):
        sender = socket.socket(family, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, LARGE_BUFFER)
    receiver.settimeout(LOST_AFTER)
    receiver.bind((address, 0))
    sender.connect(receiver.getsockname())
    return sender, receiver


def burst(source: Pod, target: Pod, address: str, sizes: Collection[int], pause: int = 100) -> None:
    """Datagrams of these sizes arrive as they were sent, in order. After `pause` the receiver catches up.

    Raises:
        AssertionError: one is missing, another, or in another place.
    """
    dice = random.Random(1)
    payloads = [dice.randbytes(size) for size in sizes]
    sender, receiver = _datagrams(source, target, address)
    with receiver, sender:
        for begin in range(0, len(payloads), pause):
            group = payloads[begin : begin + pause]
            for payload in group:
                sender.send(payload)
            received = [receiver.recv(65536) for _ in group]
            assert list(map(len, received)) == list(map(len, group))
            assert received == group


def super_datagrams(
    source: Pod, target: Pod, address: str, size: int, packets: int, *, patience: float = LOST_AFTER
) -> None:
    """What one send with UDP_SEGMENT says, as QUIC servers use it, arrives datagram by datagram.

    Raises:
        AssertionError: another datagram has arrived.
        TimeoutError: one has not arrived in `patience` seconds.
    """
    payload = random.Random(size).randbytes(size * packets - 1)
    sender, receiver = _datagrams(source, target, address)
    receiver.settimeout(patience)
    with receiver, sender:
        sender.sendmsg([payload], [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("H", size))])
        received = [receiver.recv(65536) for _ in range(packets)]
    assert [len(datagram) for datagram in received] == [*[size] * (packets - 1), size - 1]
    assert b"".join(received) == payload


def leaves_in_one_piece(source: Host, pod: Pod, target: Pod) -> bool:
    """Whether a super-packet from pod to pod, which arrives, passes its host's eth0 as one."""
    capture = Capture(source, "eth0", "udp port 8285")
    super_datagrams(pod, target, target.address, 500, 40)
    capture.wait_packet()
    return any(len(packet) > 500 * 40 / 2 for packet in capture.stop())


def exchange(a: Host, b: Host, size: int = 4 << 20) -> None:
    """Everything arrives both ways, in each family that the pods have.

    Hashed TCP both ways at once, echoes of every size with DF, bursts of odd-size UDP, super-packets of UDP.
    """
    for ours, theirs in zip(map(str, a.pod.addresses), map(str, b.pod.addresses), strict=True):
        mtu = int(a.subnet_env()["FLANNEL_MTU"])
        most = mtu - IP_HEADER[ip_address(ours).version] - UDP_HEADER
        there, back = Transfer(a.pod, b.pod, theirs, size), Transfer(b.pod, a.pod, ours, size)
        assert (there.finish(), back.finish()) == (size, size)
        for source, target, address in ((a.pod, b.pod, theirs), (b.pod, a.pod, ours)):
            burst(source, target, address, odd_sizes(most, 1))
            super_datagrams(source, target, address, 500, 40)
        assert echo_every_size(a.pod, theirs, mtu) == set()


def send_raw(namespace: Namespace, packet: bytes, target: str) -> None:
    """A packet with a header of its own."""
    family = socket.AF_INET6 if packet[0] >> 4 == 6 else socket.AF_INET
    with inside(namespace), socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(packet, (target, 0))


class IcmpErrors:
    """ICMP errors of one family that arrive in a namespace while this is open."""

    def __init__(self, namespace: Namespace, family: int = 4) -> None:
        self._kinds = {4: {3, 11}, 6: {1, 2, 3}}[family]
        self._header = 20 if family == 4 else 0
        with inside(namespace):
            if family == 4:
                self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            else:
                self._socket = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)

    def next(self, timeout: float = 3) -> tuple[str, int, int, int, bytes]:
        """Source, type, code, MTU field, what it quotes.

        Raises:
            TimeoutError: none came.
        """
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0 and select.select([self._socket], [], [], left)[0]:
            packet, (source, *_) = self._socket.recvfrom(65536)
            kind, code, _, mtu = struct.unpack_from(">BBHI", packet, self._header)
            if kind in self._kinds:
                return source, kind, code, mtu, packet[self._header + ICMP_HEADER :]
        raise TimeoutError

    def close(self) -> None:
        self._socket.close()
