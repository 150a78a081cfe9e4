"""What a host's kernel comes to know, told as it happens; run as a script in the host's namespace.

`routes NETWORK` listens to rtnetlink and tells how many routes inside NETWORK there are in table main.
`tunnel DEVICE PORT FILE` reads lines `SUBNET ADDRESS` from FILE, and sends a datagram into each subnet again
and again until one has left by DEVICE as payload of UDP to PORT at ADDRESS; it tells of how many that is so.

Both print a line `NANOSECONDS COUNT` (CLOCK_MONOTONIC, the same in all processes) each time that has changed.
Routes that stand at the beginning count as well. A process of its own, and it naps while much is happening,
so that what it costs falls on another processor and is little.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

SOL_NETLINK, ADD_MEMBERSHIP, RCVBUFFORCE = 270, 1, 33
IPV4_ROUTES = 7
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE, NLMSG_DONE = 24, 25, 26, 3
DUMP = 0x301
RT_TABLE_MAIN, RTA_DST = 254, 1
ROOM = 64 << 20
NAP = 0.0005
BUSY = 16
"""Messages at once from which on it naps."""
ROUND, RESEND = 128, 0.004
ETH_P_ALL = 3
OUTER = 14 + 20 + 8


def routes(text: str) -> None:
    network = IPv4Network(text)
    shift, inside = 32 - network.prefixlen, int(network.network_address) >> (32 - network.prefixlen)
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    kernel.setsockopt(socket.SOL_SOCKET, RCVBUFFORCE, ROOM)
    kernel.bind((0, 0))
    kernel.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, IPV4_ROUTES)
    kernel.send(struct.pack("=IHHII", 28, RTM_GETROUTE, DUMP, 1, 0) + struct.pack("=B11x", socket.AF_INET))
    standing: set[bytes] = set()
    told = -1
    while True:
        datagrams = [kernel.recv(1 << 16), *pending(kernel)]
        now = time.monotonic_ns()
        for datagram in datagrams:
            for kind, destination, table in messages(datagram):
                if table == RT_TABLE_MAIN and int.from_bytes(destination, "big") >> shift == inside:
                    (standing.add if kind == RTM_NEWROUTE else standing.discard)(destination)
        if len(standing) != told:
            told = len(standing)
            print(now, told, flush=True)
        if len(datagrams) >= BUSY:
            time.sleep(NAP)


def pending(connection: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield connection.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return


def messages(datagram: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Kind, destination and table of the routes in it."""
    start = 0
    while start + 16 <= len(datagram):
        length, kind = struct.unpack_from("=IH", datagram, start)
        if kind in (RTM_NEWROUTE, RTM_DELROUTE):
            place, end = start + 28, start + length
            while place + 4 <= end:
                size, attribute = struct.unpack_from("=HH", datagram, place)
                if attribute == RTA_DST:
                    yield kind, datagram[place + 4 : place + size], datagram[start + 20]
                    break
                place += max(4, size + 3 & ~3)
        start += max(16, length + 3 & ~3)


def tunnel(device: str, port: int, wanted: dict[str, str]) -> None:
    asked = {str(IPv4Network(subnet)[1]): address for subnet, address in wanted.items()}
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    tap.setsockopt(socket.SOL_SOCKET, RCVBUFFORCE, ROOM)
    tap.bind((device, 0))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    told = -1
    while True:
        if told != len(wanted) - len(asked):
            told = len(wanted) - len(asked)
            print(time.monotonic_ns(), told, flush=True)
        if not asked:
            return
        for inner in list(asked)[:ROUND]:
            with contextlib.suppress(OSError):  # the host is not ready for that yet
                sender.sendto(b"?", (inner, 9))
        until = time.monotonic() + RESEND
        while asked and (left := until - time.monotonic()) > 0:
            if not select.select([tap], [], [], left)[0]:
                break
            frame = tap.recv(1 << 16)
            is_udp = frame[12:14] == b"\x08\x00" and frame[14] == 0x45 and frame[23] == socket.IPPROTO_UDP
            if is_udp and int.from_bytes(frame[36:38], "big") == port:
                inner = socket.inet_ntoa(frame[OUTER + 16 : OUTER + 20])
                if asked.get(inner) == socket.inet_ntoa(frame[30:34]):
                    del asked[inner]


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "routes":
        routes(arguments[0])
    else:
        lines = Path(arguments[2]).read_text().splitlines()
        tunnel(arguments[0], int(arguments[1]), dict(line.split() for line in lines))
