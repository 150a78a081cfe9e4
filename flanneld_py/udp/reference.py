"""The plain twin of packet.c, table.c and segment.c, against which the tests hold them. Nothing else runs it.

It says each rule once, in the order the standards do, and recomputes what the C code updates. packet.h
describes what the functions are for; here packets are `bytes`, numbers are ints, and a drop is its reason's
name or None.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise

from msgspec import Struct

DROPS = (
    "none",
    "too-short",
    "version",
    "header-length",
    "total-length",
    "header-checksum",
    "ttl-zero",
    "outer-source-unknown",
    "inner-destination",
    "inner-source",
    "ipv6-not-agreed",
    "no-route",
    "ttl-exceeded",
    "too-big",
    "offload",
    "send-failed",
    "queue-full",
    "write-failed",
    "truncated",
)

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION, MOBILITY = 0, 43, 44, 51, 60, 135
EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION, MOBILITY)
FIN, PSH, ACK, CWR = 0x01, 0x08, 0x10, 0x80
DF, MF, OFFSET = 0x4000, 0x2000, 0x1FFF
NEEDS_CSUM, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_ECN = 1, 0, 1, 4, 5, 0x80
ANY, NETWORK, STRICT = 0, 1, 2

Address = IPv4Address | IPv6Address


class Vnet(Struct, frozen=True):
    """`struct virtio_net_hdr`."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self) -> bytes:
        words = (self.hdr_len, self.gso_size, self.csum_start, self.csum_offset)
        return struct.pack("=BBHHHH", self.flags, self.gso_type, *words)


class Ip(Struct, frozen=True):
    """A packet's IP header, read."""

    version: int
    header_length: int
    """IPv6: without extension headers."""
    protocol: int
    ttl: int
    source: Address
    destination: Address
    field: int = 0
    """IPv4: flags and fragment offset."""


def be16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def be32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def put16(data: bytes, at: int, value: int) -> bytes:
    return put(data, at, value.to_bytes(2, "big"))


def checksum(data: bytes) -> int:
    """RFC 1071: the complement of the one's complement sum of the 16-bit words, an odd byte padded with 0."""
    total = sum(be16(data + b"\0", at) for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def pseudo_header(ip: Ip, protocol: int, length: int) -> bytes:
    if ip.version == 4:
        return ip.source.packed + ip.destination.packed + struct.pack(">BBH", 0, protocol, length)
    return ip.source.packed + ip.destination.packed + struct.pack(">IHBB", length, 0, 0, protocol)


# --- checks ---------------------------------------------------------------------------------------


def parse(packet: bytes) -> tuple[str | None, Ip | None]:
    if len(packet) < 20:
        return "too-short", None
    version = packet[0] >> 4
    if version == 4:
        return _parse4(packet)
    if version == 6:
        return _parse6(packet)
    return "version", None


def _parse4(packet: bytes) -> tuple[str | None, Ip | None]:
    header_length = (packet[0] & 0x0F) * 4
    if not 20 <= header_length <= len(packet):
        return "header-length", None
    if be16(packet, 2) != len(packet):
        return "total-length", None
    source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    return None, Ip(4, header_length, packet[9], packet[8], source, destination, be16(packet, 6))


def _parse6(packet: bytes) -> tuple[str | None, Ip | None]:
    if len(packet) < 40:
        return "too-short", None
    if 40 + be16(packet, 4) != len(packet):
        return "total-length", None
    return None, Ip(6, 40, packet[6], packet[7], IPv6Address(packet[8:24]), IPv6Address(packet[24:40]))


class Table(Struct, frozen=True):
    """The packed table, as lists."""

    source_check: int
    mtu: int
    own: dict[int, tuple[Address, Address]]
    """First and last by version; absent where a family is not in use."""
    addresses: dict[int, Address]
    peers: list[tuple[IPv4Address, int, int]]
    """Address, port, flags."""
    ranges: list[tuple[Address, Address, int]]
    networks: list[tuple[Address, Address]]

    def owner(self, address: Address) -> int | None:
        """The index of the peer behind which an address is."""
        return next((peer for first, last, peer in self.ranges if _within(first, address, last)), None)


def _within(first: Address, address: Address, last: Address) -> bool:
    return first.version == address.version and int(first) <= int(address) <= int(last)


def unpack(data: bytes) -> Table:
    """Raises ValueError when the table is not as packet.h describes it."""
    if len(data) < 92 or data[:4] != b"FPT1":
        raise ValueError("no table")
    length, check, families, mtu = struct.unpack_from("<IBBH", data, 4)
    peers, ranges4, ranges6, networks4, networks6 = struct.unpack_from("<IIIII", data, 12)
    parts = 8 * peers + 12 * ranges4 + 36 * ranges6 + 8 * networks4 + 32 * networks6
    if (
        length != len(data)
        or length != 92 + parts
        or check > STRICT
        or families > 3
        or not 68 <= mtu <= 65507
    ):
        raise ValueError("header")
    reader = _Reader(data, 32)
    own4, address4 = (reader.number4(), reader.number4()), reader.number4()
    own6, address6 = (reader.bytes6(), reader.bytes6()), reader.bytes6()
    table = Table(
        check,
        mtu,
        {v: pair for v, pair in ((4, own4), (6, own6)) if families & (1 if v == 4 else 2)},
        {v: one for v, one in ((4, address4), (6, address6)) if families & (1 if v == 4 else 2)},
        [(IPv4Address(reader.take(4)), be16(reader.take(2), 0), reader.small()) for _ in range(peers)],
        [(reader.number4(), reader.number4(), reader.index()) for _ in range(ranges4)]
        + [(reader.bytes6(), reader.bytes6(), reader.index()) for _ in range(ranges6)],
        [(reader.number4(), reader.number4()) for _ in range(networks4)]
        + [(reader.bytes6(), reader.bytes6()) for _ in range(networks6)],
    )
    if own4[0] > own4[1] or own6[0] > own6[1] or max(networks4, networks6) > 16:
        raise ValueError("own subnet or networks")
    _check_parts(table)
    return table


def _check_parts(table: Table) -> None:
    addresses = [int(address) for address, _, _ in table.peers]
    if 0 in addresses or any(not port or flags & ~1 for _, port, flags in table.peers):
        raise ValueError("a peer")
    if any(one >= two for one, two in pairwise(addresses)):
        raise ValueError("order of peers")
    if any(peer >= len(table.peers) for _, _, peer in table.ranges):
        raise ValueError("a range without peer")
    for spans in ([(first, last) for first, last, _ in table.ranges], table.networks):
        for version in (4, 6):
            ends = [int(end) for span in spans if span[0].version == version for end in span]
            firsts, lasts = ends[::2], ends[1::2]
            if any(first > last for first, last in zip(firsts, lasts, strict=True)):
                raise ValueError("a range ends before it begins")
            if any(last >= first for last, first in zip(lasts, firsts[1:], strict=False)):
                raise ValueError("order of ranges")


class _Reader(Struct):
    data: bytes
    at: int

    def take(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]

    def number4(self) -> IPv4Address:
        return IPv4Address(int.from_bytes(self.take(4), "little"))

    def bytes6(self) -> IPv6Address:
        return IPv6Address(self.take(16))

    def index(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def small(self) -> int:
        return int.from_bytes(self.take(2), "little")


def accept(table: Table, sender: int | None, packet: bytes) -> str | None:  # noqa: PLR0911 (one each)
    """Why a packet received from a peer may not enter our TUN."""
    wrong, ip = parse(packet)
    if ip is None:
        return wrong
    own = table.own.get(ip.version)
    if ip.version == 4 and checksum(packet[: ip.header_length]) != 0:
        return "header-checksum"
    if ip.ttl == 0:
        return "ttl-zero"
    if sender is None:
        return "outer-source-unknown"
    if own is None or not _within(own[0], ip.destination, own[1]):
        return "inner-destination"
    if not _source_allowed(table, sender, ip.source):
        return "inner-source"
    if ip.version == 6 and not table.peers[sender][2] & 1:
        return "ipv6-not-agreed"
    return None


def _source_allowed(table: Table, sender: int, source: Address) -> bool:
    if table.source_check == ANY or table.owner(source) == sender:
        return True
    return table.source_check == NETWORK and not any(_within(one, source, two) for one, two in table.networks)


def route(table: Table, packet: bytes) -> tuple[str | None, int | None]:
    """Why a packet from the TUN may not be sent; and to which peer it goes."""
    wrong, ip = parse(packet)
    if ip is None:
        return wrong, None
    peer = table.owner(ip.destination)
    if peer is None:
        return "no-route", None
    if ip.version == 6 and not table.peers[peer][2] & 1:
        return "ipv6-not-agreed", peer
    return ("ttl-exceeded" if ip.ttl <= 1 else None), peer


def finish(packet: bytes, vnet: Vnet) -> tuple[str | None, bytes]:
    """TTL, and the transport checksum the kernel has left to us."""
    _, ip = parse(packet)
    assert ip is not None  # noqa: S101 (this is the tests' own)
    at = vnet.csum_start + vnet.csum_offset
    if vnet.gso_type == GSO_NONE and vnet.flags & NEEDS_CSUM:
        if vnet.csum_start < ip.header_length or at + 2 > len(packet):
            return "offload", packet
        packet = put16(packet, at, checksum(packet[vnet.csum_start :]) or 0xFFFF)
    if ip.version == 6:
        return None, put(packet, 7, bytes([ip.ttl - 1]))
    changed = put(packet, 8, bytes([ip.ttl - 1]))
    # RFC 1624, equation 3
    total = (be16(packet, 10) ^ 0xFFFF) + (be16(packet, 8) ^ 0xFFFF) + be16(changed, 8)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return None, put16(changed, 10, total ^ 0xFFFF)


# --- cutting --------------------------------------------------------------------------------------


def _transport(packet: bytes, ip: Ip, protocol: int) -> int | None:
    """Where the header of a protocol begins in a packet that can be cut."""
    at, following = ip.header_length, ip.protocol
    if ip.version == 4:
        return at if following == protocol and not ip.field & (MF | OFFSET) else None
    while following != protocol:
        if following not in {HOP_BY_HOP, ROUTING, DESTINATION} or at + 8 > len(packet):
            return None
        if following == ROUTING and packet[at + 3]:
            return None
        following, at = packet[at], at + 8 * (packet[at + 1] + 1)
    return at


def headers(packet: bytes, vnet: Vnet) -> tuple[int, int, int] | None:
    """Protocol, begin of the transport header, length of all headers; None when it is no super-packet."""
    _, ip = parse(packet)
    kind = vnet.gso_type & ~GSO_ECN
    if ip is None or kind not in {GSO_UDP, GSO_TCPV4 if ip.version == 4 else GSO_TCPV6} or not vnet.gso_size:
        return None
    protocol, least = (UDP, 8) if kind == GSO_UDP else (TCP, 20)
    at = _transport(packet, ip, protocol)
    if at is None or (vnet.flags & NEEDS_CSUM and vnet.csum_start != at) or at + least > len(packet):
        return None
    length = least if protocol == UDP else packet[at + 12] // 16 * 4
    if length < least or not at + length <= min(len(packet), 256):
        return None
    if -(-(len(packet) - at - length) // vnet.gso_size) > (128 if protocol == UDP else 2048):
        return None
    return protocol, at, at + length


def fit(packet: bytes, vnet: Vnet, mtu: int) -> str:
    _, ip = parse(packet)
    longest = len(packet)
    if vnet.gso_type != GSO_NONE and longest > mtu:
        found = headers(packet, vnet)
        if found is None:
            return "whole"
        longest = min(longest, found[2] + vnet.gso_size)
    if longest <= mtu:
        return "whole"
    return "too-big" if ip is None or ip.version == 6 or ip.field & DF else "fragments"


def segments(packet: bytes, vnet: Vnet) -> list[bytes] | None:
    """The packets a super-packet stands for; None when its vnet header does not fit it."""
    found = headers(packet, vnet)
    if found is None:
        return None
    protocol, at, header_length = found
    payload = packet[header_length:]
    slices = [payload[i : i + vnet.gso_size] for i in range(0, len(payload), vnet.gso_size)] or [b""]
    return [
        complete(_segment_headers(packet[:header_length], at, protocol, number, slices) + one, at, protocol)
        for number, one in enumerate(slices)
    ]


def _segment_headers(header: bytes, at: int, protocol: int, number: int, slices: Sequence[bytes]) -> bytes:
    if header[0] >> 4 == 4:
        header = put16(header, 4, (be16(header, 4) + number) & 0xFFFF)
    if protocol == UDP:
        return header
    flags = header[at + 13]
    if number < len(slices) - 1:
        flags &= ~(FIN | PSH)
    if number > 0:
        flags &= ~CWR
    sequence = be32(header, at + 4) + sum(map(len, slices[:number]))
    header = put(header, at + 4, (sequence & 0xFFFFFFFF).to_bytes(4, "big"))
    return put(header, at + 13, bytes([flags]))


def complete(packet: bytes, at: int, protocol: int) -> bytes:
    """A packet with lengths and checksums right."""
    if packet[0] >> 4 == 4:
        packet = put16(put16(packet, 2, len(packet)), 10, 0)
        packet = put16(packet, 10, checksum(packet[: (packet[0] & 15) * 4]))
    else:
        packet = put16(packet, 4, len(packet) - 40)
    _, ip = parse(packet)
    assert ip is not None  # noqa: S101
    field = at + (6 if protocol == UDP else 16)
    if protocol == UDP:
        packet = put16(packet, at + 4, len(packet) - at)
    packet = put16(packet, field, 0)
    right = checksum(pseudo_header(ip, protocol, len(packet) - at) + packet[at:])
    return put16(packet, field, 0xFFFF if protocol == UDP and right == 0 else right)


def fragments(packet: bytes, mtu: int) -> list[bytes]:
    """RFC 791, 3.2: an example fragmentation procedure."""
    _, ip = parse(packet)
    assert ip is not None  # noqa: S101
    length = ip.header_length
    payload, size = packet[length:], (mtu - length) // 8 * 8
    result = []
    for begin in range(0, len(payload), size):
        place = (ip.field & OFFSET) + begin // 8
        if place > OFFSET:
            break
        more = MF if begin + size < len(payload) else 0
        header = packet[:length] if begin == 0 else packet[:20] + _copied(packet[20:length])
        header = put16(header, 2, length + len(payload[begin : begin + size]))
        header = put16(put16(header, 6, ip.field & ~OFFSET | place | more), 10, 0)
        result.append(put16(header, 10, checksum(header)) + payload[begin : begin + size])
    return result


def _copied(options: bytes) -> bytes:
    """Options of a later fragment: no-operations in place of those without the copied bit."""
    result, rest = b"", options
    while rest and rest[0] != 0:
        if rest[0] == 1:
            size = 1
        elif len(rest) < 2 or not 2 <= rest[1] <= len(rest):
            break
        else:
            size = rest[1]
        result += rest[:size] if rest[0] & 0x80 else b"\1" * size
        rest = rest[size:]
    return result + rest
