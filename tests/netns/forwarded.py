"""Where backend udp really sends what is for a peer: a host sends packets, the underlay shows where to.

It imports nothing of the product, and asks nothing of it.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address, ip_address, ip_network
from typing import TYPE_CHECKING

from flanneld_py.lab.entering import inside
from tests.netns.udp_traffic import ones_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flanneld_py.lab import Host

ETH_P_ALL, ETH_P_IP, ETH_P_ARP = 3, 0x0800, 0x0806
ARP_REQUEST, ARP_REPLY = 1, 2
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER = 32 << 20
PATIENCE = 0.4
"""Seconds until a packet went nowhere."""
AGAIN = 0.08
"""Seconds until it is sent once more."""
IN_VAIN = 2
"""Rounds after which nothing at all has left."""
NOBODY_THERE = 0.03
"""Seconds in which a real host has answered an ARP request."""
AT_ONCE = 100
"""Packets; the queue of a TUN is not long."""
MAC = bytes.fromhex("0200c0ffffff")
PORT = 8285
"""Of backend udp."""
ECHO_REPLY = {4: 0, 6: 129}
"""Unasked for, it is received in silence."""


def forwarded(host: Host, subnets: Iterable[str]) -> dict[str, str]:
    """Subnet → address of the peer that a packet to its first address leaves for, of those where one leaves.

    Args:
        host: sends.
        subnets: of either family.
    """
    with ExitStack() as stack:
        return _Probe(host, stack).run(list(subnets))


class _Probe:
    """Packets to subnets, a tap where they leave the host, and answers for peers that do not exist."""

    def __init__(self, host: Host, stack: ExitStack) -> None:
        self._host = host
        self._nonce = os.urandom(12)
        with inside(host.underlay):
            everything = socket.htons(ETH_P_ALL)
            self._tap = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, everything))
            self._tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        self._cables = _cables(host)
        with inside(host):
            self._raw = {
                4: stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
                6: stack.enter_context(
                    socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
                ),
            }
        self._asked: dict[bytes, tuple[float, str, bytes]] = {}
        """Address that ARP asked for → when, on which port, and the frame."""
        self._played: list[str] = []
        """`IP dev NAME` of each neighbour."""
        self._found: dict[int, str] = {}

    def run(self, subnets: Sequence[str]) -> dict[str, str]:
        deadline, rounds = time.monotonic() + PATIENCE, 0
        while (missing := set(range(len(subnets))) - self._found.keys()) and time.monotonic() < deadline:
            if rounds == IN_VAIN and not self._found:
                break  # nobody forwards
            rounds += 1
            places = sorted(missing)
            for first in range(0, len(places), AT_ONCE):
                some = places[first : first + AT_ONCE]
                for place in some:
                    self._send(place, subnets[place])
                self._look(set(some), min(deadline, time.monotonic() + AGAIN))
            if not missing <= self._found.keys():
                # Somebody else's packet may have asked for a neighbour, who is asked for again in a second.
                flush = ["ip", "neigh", "flush", "dev", self._host.interface, "nud", "incomplete"]
                self._host.run(flush)
        if self._played:
            self._host.ip_batch([f"neigh del {neighbour}" for neighbour in self._played])
        return {subnets[place]: peer for place, peer in self._found.items()}

    def _send(self, place: int, subnet: str) -> None:
        target = ip_network(subnet).network_address
        text = struct.pack(">BBHI", ECHO_REPLY[target.version], 0, 0, place) + self._nonce
        if target.version == 4:
            text = text[:2] + struct.pack(">H", 0xFFFF & ~ones_sum(text)) + text[4:]
        with suppress(OSError):  # without a route it goes nowhere
            self._raw[target.version].sendto(text, (str(target), 0))

    def _look(self, wanted: set[int], until: float) -> None:
        while not wanted <= self._found.keys() and (left := until - time.monotonic()) > 0:
            self._play()
            self._tap.settimeout(min(left, NOBODY_THERE))
            with suppress(TimeoutError):
                frame, (port, kind, direction, *_) = self._tap.recvfrom(1 << 16)
                if port not in self._cables:
                    continue
                outgoing = direction == socket.PACKET_OUTGOING
                if kind == ETH_P_ARP:
                    self._hear(port, frame, outgoing=outgoing)
                elif kind == ETH_P_IP and not outgoing:
                    self._read(frame[14:])

    def _read(self, packet: bytes) -> None:
        """One that leaves the host: whether it carries one of ours."""
        begin = 4 * (packet[0] & 15)
        if packet[9] != socket.IPPROTO_UDP or packet[begin + 2 : begin + 4] != struct.pack(">H", PORT):
            return
        inner = packet[begin + 8 :]
        text = inner[40:] if inner[0] >> 4 == 6 else inner[4 * (inner[0] & 15) :]
        if text[8:20] == self._nonce:
            self._found[struct.unpack_from(">I", text, 4)[0]] = str(IPv4Address(packet[16:20]))

    def _hear(self, port: str, frame: bytes, *, outgoing: bool) -> None:
        asked = struct.unpack_from(">H", frame, 20)[0]
        if outgoing and asked == ARP_REPLY:
            self._asked.pop(frame[28:32], None)
        elif not outgoing and asked == ARP_REQUEST:
            self._asked.setdefault(frame[38:42], (time.monotonic(), port, frame))

    def _play(self) -> None:
        """Answer in the place of peers that exist in the registry only; what is for them gets no further."""
        now = time.monotonic()
        for address in [peer for peer, (at, *_) in self._asked.items() if at < now - NOBODY_THERE]:
            _, port, frame = self._asked.pop(address)
            asker = frame[22:32]
            arp = struct.pack(">HHBBH", 1, ETH_P_IP, 6, 4, ARP_REPLY) + MAC + address + asker
            self._tap.sendto(asker[:6] + MAC + struct.pack(">H", ETH_P_ARP) + arp, (port, ETH_P_ARP))
            self._played.append(f"{ip_address(address)} dev {self._cables[port]}")


def _cables(host: Host) -> dict[str, str]:
    """The underlay's end → the host's, of the cables between them; a host may have two."""
    ports = {
        (link["ifindex"], link.get("link_index")): link["ifname"] for link in host.underlay.ip("link", "show")
    }
    nearby = {(link.get("link_index"), link["ifindex"]): link["ifname"] for link in host.ip("link", "show")}
    return {str(ports[ends]): str(name) for ends, name in nearby.items() if ends in ports}
