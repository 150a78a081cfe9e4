"""What Go flannel's udp backend moves packets with, for tests/gonode.py: one packet a datagram.

Played from the compatibility contract alone, with what is wrong in it (S26): a hop counts twice, whatever
comes in goes to the TUN, a longer datagram is cut off, and the first route that fits is taken, not the best.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Network

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
HEADER = 20
LONGEST = 65_536
NET_UNREACHABLE = struct.pack(">BB", 3, 0)


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", 0xFFFF & ~total)


def _one_hop_further(packet: bytes) -> bytes | None:
    """With a TTL less by one; None once that is 0. From 0 it becomes 255."""
    ttl = (packet[8] - 1) & 0xFF
    if ttl == 0:
        return None
    total = struct.unpack_from(">H", packet, 10)[0] + 0x0100  # RFC 1624
    return b"".join(
        (
            packet[:8],
            bytes([ttl]),
            packet[9:10],
            struct.pack(">H", (total + (total >> 16)) & 0xFFFF),
            packet[12:],
        )
    )


class Proxy:
    """Forwards in a thread from `start` on, between a TUN that goes with this process and a socket."""

    def __init__(self, address: str, port: int, mtu: int) -> None:
        self._port, self._mtu = port, mtu
        self._tun = os.open("/dev/net/tun", os.O_RDWR)
        request = struct.pack("16sH22x", b"flannel%d", IFF_TUN | IFF_NO_PI)
        answer: bytes = fcntl.ioctl(self._tun, TUNSETIFF, request)
        self.device = answer[:16].rstrip(b"\0").decode()
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((address, port))
        self._source = b""
        self._routes: list[tuple[int, int, str]] = []
        """Network, mask and next hop; the one used last comes first."""
        self._lock = threading.Lock()

    def set(self, subnet: IPv4Network, peer: str) -> None:
        with self._lock:
            row = (int(subnet.network_address), int(subnet.netmask), peer)
            places = [n for n, found in enumerate(self._routes) if found[:2] == row[:2]]
            if places:
                self._routes[places[0]] = row
            else:
                self._routes.append(row)

    def delete(self, subnet: IPv4Network) -> None:
        with self._lock:
            gone = int(subnet.network_address), int(subnet.netmask)
            self._routes = [row for row in self._routes if row[:2] != gone]

    def start(self, source: IPv4Address) -> None:
        """`source`: of its ICMP messages."""
        self._source = source.packed
        os.set_blocking(self._tun, False)
        self._udp.setblocking(False)
        threading.Thread(target=self._forward, daemon=True).start()

    def _forward(self) -> None:
        while True:
            select.select([self._tun, self._udp.fileno()], [], [])
            busy = True
            while busy:
                busy = False
                with suppress(BlockingIOError):
                    self._send(os.read(self._tun, LONGEST))
                    busy = True
                with suppress(BlockingIOError):
                    self._receive(self._udp.recv(self._mtu))
                    busy = True

    def _send(self, packet: bytes) -> None:
        if len(packet) < HEADER:
            return
        peer = self._next_hop(int.from_bytes(packet[16:20], "big"))
        if peer is None:
            self._refuse(packet)
        elif (sent := _one_hop_further(packet)) is not None:
            with suppress(OSError):
                self._udp.sendto(sent, (peer, self._port))

    def _receive(self, packet: bytes) -> None:
        if len(packet) >= HEADER and (received := _one_hop_further(packet)) is not None:
            with suppress(OSError):
                os.write(self._tun, received)

    def _next_hop(self, target: int) -> str | None:
        with self._lock:
            for place, (network, mask, peer) in enumerate(self._routes):
                if target & mask == network:
                    self._routes.insert(0, self._routes.pop(place))
                    return peer
        return None

    def _refuse(self, packet: bytes) -> None:
        is_later_fragment = struct.unpack_from(">H", packet, 6)[0] & 0x1FFF
        length = 4 * (packet[0] & 15)
        if packet[9] == socket.IPPROTO_ICMP or is_later_fragment or length == 60:
            return
        quoted = bytes(4) + packet[: length + 8]
        quoted += bytes(len(quoted) % 2)
        icmp = NET_UNREACHABLE + _checksum(NET_UNREACHABLE + bytes(2) + quoted) + quoted
        size = struct.pack(">HHH", HEADER + len(icmp), 0, 0)
        header = b"\x45\0" + size + bytes([8, socket.IPPROTO_ICMP]) + bytes(2) + self._source + packet[12:16]
        with suppress(OSError):
            os.write(self._tun, header[:10] + _checksum(header) + header[12:] + icmp)
