"""What becomes of a packet in pypump.py: checks, checksums, cutting, ICMP; packet.h describes all of it.

One's complement sums are taken of little-endian numbers, `int.from_bytes(…, "little") % 65535`: the quickest
that Python has, and right at any length.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False  # without an import of typing
if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.udp.pytable import Table

    Buffer = bytearray | memoryview

VNET = struct.Struct("=BBHHHH")
_ID, _U32 = struct.Struct(">H"), struct.Struct(">I")
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80
PLAIN = bytes(VNET.size)
"""The vnet header of a packet that is complete."""
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
FRAGMENT, AUTHENTICATION, ROUTING = 44, 51, 43
EXTENSIONS = frozenset({0, 43, 44, 51, 60, 135})
"""IPv6 extension headers; what follows them is not seen without walking them."""
CUTTABLE_EXTENSIONS = frozenset({0, 43, 60})
DF, MF, OFFSET = 0x4000, 0x2000, 0x1FFF
TCP_SEGMENTS_MAX, UDP_SEGMENTS_MAX = 2048, 128
"""Of one super-packet; see packet.h."""
HEADER_MAX = 256
ICMP4_MAX, ICMP6_MAX = 576, 1280
PEER_IPV6 = 1
NO_ROUTE, TTL_EXCEEDED, TOO_BIG = "no-route", "ttl-exceeded", "too-big"
ICMP_ABOUT = {NO_ROUTE: (3, 1), TTL_EXCEEDED: (11, 3), TOO_BIG: (3, 2)}
"""Reason → ICMP and ICMPv6 type of the answer."""


def sum_of(data: Buffer | bytes) -> int:
    """Its one's complement sum, as a little-endian word."""
    return int.from_bytes(data, "little") % 65535


def swapped(value: int) -> int:
    """A number as its bytes in network order make it: what to add to a sum_of."""
    return (value & 0xFF) << 8 | value >> 8


def checksum(total: int) -> bytes:
    """The checksum field that makes it right."""
    return (-total % 65535).to_bytes(2, "little")


def parse(packet: Buffer) -> str | None:
    """Why it is no packet: lengths and version. None when it is one."""
    length = len(packet)
    version = packet[0] >> 4 if length >= 20 else 0
    if version == 4:
        header, total = (packet[0] & 15) * 4, packet[2] << 8 | packet[3]
        if header < 20 or header > length:
            return "header-length"
    elif version == 6 and length >= 40:
        total = (packet[4] << 8 | packet[5]) + 40
    else:
        return "too-short" if length < 20 or version == 6 else "version"
    return None if total == length else "total-length"


def header_length(packet: Buffer) -> int:
    """Of the IP header; extension headers of IPv6 are not counted."""
    return (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40


def accept(table: Table, sender: int | None, packet: Buffer) -> str | None:
    """Why a packet from a peer may not enter our TUN."""
    if (wrong := parse(packet)) is not None:
        return wrong
    four = packet[0] >> 4 == 4
    if four and sum_of(packet[: (packet[0] & 15) * 4]) != 0:
        return "header-checksum"
    if packet[8 if four else 7] == 0:
        return "ttl-zero"
    if sender is None:
        return "outer-source-unknown"
    return _refused(table, sender, packet, four)


def _refused(table: Table, sender: int, packet: Buffer, four: bool) -> str | None:
    """Why a peer may not send this, from and to these addresses."""
    if not table.is_ours(bytes(packet[16:20] if four else packet[24:40])):
        return "inner-destination"
    if not table.may_send(sender, bytes(packet[12:16] if four else packet[8:24])):
        return "inner-source"
    if not four and not table.flags[sender] & PEER_IPV6:
        return "ipv6-not-agreed"
    return None


def route(table: Table, packet: Buffer) -> tuple[str | None, int]:
    """Why it cannot be sent, or None; and to which peer."""
    if (wrong := parse(packet)) is not None:
        return wrong, -1
    four = packet[0] >> 4 == 4
    peer = table.owner(bytes(packet[16:20] if four else packet[24:40]))
    if peer is None:
        return NO_ROUTE, -1
    if not four and not table.flags[peer] & PEER_IPV6:
        return "ipv6-not-agreed", peer
    return (TTL_EXCEEDED if packet[8 if four else 7] <= 1 else None), peer


def finish(packet: Buffer, flags: int, gso_type: int, start: int, offset: int) -> bool:
    """Our hop: TTL, and the checksum the kernel left to us. False when that would lie outside the packet."""
    four = packet[0] >> 4 == 4
    if gso_type == GSO_NONE and flags & NEEDS_CSUM:
        at = start + offset
        if start < header_length(packet) or at + 2 > len(packet):
            return False
        # As in the kernel, 0 is written as 0xffff: to UDP it would mean that there is no checksum.
        total = sum_of(packet[start:])
        packet[at : at + 2] = checksum(total) if total else b"\xff\xff"
    if four:
        packet[8] -= 1
        field = int.from_bytes(packet[10:12], "big") + 0x0100
        packet[10:12] = ((field & 0xFFFF) + (field >> 16)).to_bytes(2, "big")
    else:
        packet[7] -= 1
    return True


# --- cutting --------------------------------------------------------------------------------------


def _transport6(packet: Buffer, protocol: int) -> int:
    """Where the header of TCP or UDP begins; 0 when it cannot be found."""
    at, following = 40, packet[6]
    while following != protocol:
        if following not in CUTTABLE_EXTENSIONS or at + 8 > len(packet):
            return 0
        if following == ROUTING and packet[at + 3]:
            return 0
        following = packet[at]
        at += (packet[at + 1] + 1) * 8
    return at


def super_headers(packet: Buffer, gso_type: int, size: int) -> tuple[int, int] | None:
    """Of a super-packet: where TCP or UDP begins, and where the payload; None when it is none."""
    kind, four = gso_type & ~GSO_ECN, packet[0] >> 4 == 4
    udp = kind == GSO_UDP_L4
    if size == 0 or not (udp or kind == (GSO_TCPV4 if four else GSO_TCPV6)):
        return None
    protocol = UDP if udp else TCP
    if not four:
        transport = _transport6(packet, protocol)
    elif packet[9] != protocol or int.from_bytes(packet[6:8], "big") & (MF | OFFSET):
        return None
    else:
        transport = header_length(packet)
    length = len(packet)
    if transport == 0 or transport + (8 if udp else 20) > length:
        return None
    payload = transport + (8 if udp else (packet[transport + 12] >> 4) * 4)
    if payload < transport + (8 if udp else 20) or payload > min(length, HEADER_MAX):
        return None
    if length - payload > size * (UDP_SEGMENTS_MAX if udp else TCP_SEGMENTS_MAX):
        return None
    return transport, payload


def segments_count(packet: Buffer, vnet: tuple[int, int, int, int, int, int]) -> int:
    """How many packets these bytes stand for: 1 for a plain packet, and for what cannot be cut."""
    flags, gso_type, _, size, start, _ = vnet
    if gso_type == GSO_NONE or parse(packet) is not None:
        return 1
    cut = super_headers(packet, gso_type, size)
    if cut is None or (flags & NEEDS_CSUM and start != cut[0]):
        return 1
    return max(-(-(len(packet) - cut[1]) // size), 1)


def _shared(header: bytearray, transport: int, *, udp: bool) -> tuple[int, int]:
    """Sums of what all segments share: of the IP header, and of TCP or UDP with the pseudo header."""
    shared, four = bytearray(header), header[0] >> 4 == 4
    addresses = sum_of(shared[12:20] if four else shared[8:40])
    shared[transport + 4 : transport + 8] = bytes(4)
    if not udp:
        shared[transport + 13] = 0
        shared[transport + 16 : transport + 18] = bytes(2)
    if four:
        shared[2:6] = bytes(4)
        shared[10:12] = bytes(2)
    pseudo = addresses + swapped(UDP if udp else TCP)
    return sum_of(shared[:transport]), sum_of(shared[transport:]) + pseudo


def segments(
    packet: Buffer, gso_type: int, size: int, transport: int, begin: int
) -> Iterator[tuple[bytearray, Buffer]]:
    """Headers and payload of each segment of a super-packet, as the kernel itself would cut it."""
    four, udp, length = packet[0] >> 4 == 4, gso_type & ~GSO_ECN == GSO_UDP_L4, len(packet)
    template = bytearray(packet[:begin])
    network_sum, transport_sum = _shared(template, transport, udp=udp)
    identification, sequence = _ID.unpack_from(template, 4)[0], _U32.unpack_from(template, transport + 4)[0]
    flags, taken = template[transport + 13] if not udp else 0, -1
    for at in range(begin, max(length, begin + 1), size):
        payload = packet[at : at + size]
        if len(payload) != taken:  # the first, and the last when it is shorter
            taken = len(payload)
            total, rest = begin + taken, begin + taken - transport
            length_sum, rest_sum = network_sum + swapped(total), transport_sum + swapped(rest) * (1 + udp)
            _ID.pack_into(template, 2 if four else 4, total if four else total - 40)
        header = template[:]
        if four:
            _ID.pack_into(header, 4, identification)
            word = length_sum + ((identification & 0xFF) << 8 | identification >> 8)
            header[10:12] = (-word % 65535).to_bytes(2, "little")
            identification = identification + 1 & 0xFFFF
        if udp:
            _ID.pack_into(header, transport + 4, rest)
            # 0 would mean that there is no checksum.
            word = (rest_sum + int.from_bytes(payload, "little")) % 65535
            header[transport + 6 : begin] = (65535 - word).to_bytes(2, "little")
        else:
            now = flags & (~9 if at + size < length else 0xFF) & (~0x80 if at > begin else 0xFF)
            header[transport + 13] = now  # FIN and PSH on the last, CWR on the first
            _U32.pack_into(header, transport + 4, sequence)
            word = rest_sum + (now << 8) + swapped(sequence >> 16) + swapped(sequence & 0xFFFF)
            word += int.from_bytes(payload, "little")
            header[transport + 16 : transport + 18] = (-word % 65535).to_bytes(2, "little")
            sequence = sequence + taken & 0xFFFFFFFF
        yield header, payload


def may_fragment(packet: Buffer) -> bool:
    """IPv4 without DF."""
    return packet[0] >> 4 == 4 and not packet[6] & (DF >> 8)


def _without_first_options(header: bytearray) -> bytearray:
    """Options without the copied bit become no-operations, as in Linux's ip_options_fragment."""
    at, header = 20, bytearray(header)
    while at < len(header) and header[at]:
        if header[at] == 1:
            at += 1
            continue
        length = header[at + 1] if at + 1 < len(header) else 0
        if length < 2 or at + length > len(header):
            break
        if not header[at] & 0x80:
            header[at : at + length] = b"\x01" * length
        at += length
    return header


def fragments(packet: Buffer, mtu: int) -> Iterator[tuple[bytearray, Buffer]]:
    """Header and payload of each fragment (RFC 791 3.2)."""
    begin, length = header_length(packet), len(packet)
    field, size = _ID.unpack_from(packet, 6)[0], mtu - begin & ~7
    first = bytearray(packet[:begin])
    later = _without_first_options(first)
    for at in range(begin, length, size):
        place = (field & OFFSET) + (at - begin) // 8
        if place > OFFSET:  # beyond what can be put together again
            return
        payload, header = packet[at : at + size], bytearray(first if at == begin else later)
        _ID.pack_into(header, 2, begin + len(payload))
        _ID.pack_into(header, 6, field & ~OFFSET | place | (MF if at + size < length else 0))
        header[10:12] = bytes(2)
        header[10:12] = checksum(sum_of(header))
        yield header, payload


# --- ICMP -----------------------------------------------------------------------------------------


def _may_answer4(packet: Buffer) -> bool:
    source, begin = packet[12], header_length(packet)
    if source in {0, 127} or source >= 224 or packet[16] >= 224 or _ID.unpack_from(packet, 6)[0] & OFFSET:
        return False
    if packet[9] != ICMP:
        return True
    return len(packet) > begin and packet[begin] not in {3, 4, 5, 11, 12}


def _may_answer6(packet: Buffer, reason: str) -> bool:
    source = int.from_bytes(packet[8:24], "big")
    if source in {0, 1} or packet[8] == 0xFF or (packet[24] == 0xFF and reason != TOO_BIG):
        return False
    at, following = 40, packet[6]
    while following in EXTENSIONS:
        if at + 8 > len(packet):
            return False
        size = (packet[at + 1] + 1) * 8
        if following == FRAGMENT:
            if _ID.unpack_from(packet, at + 2)[0] & ~7:
                return False
            size = 8
        elif following == AUTHENTICATION:
            size = (packet[at + 1] + 2) * 4
        following = packet[at]
        at += size
    return following != ICMPV6 or (at < len(packet) and packet[at] >= 128 and packet[at] != 137)


def icmp_error(table: Table, reason: str, mtu: int, packet: Buffer) -> bytes | None:
    """The ICMP packet that tells the sender of `packet` why it was dropped; None when none may be sent."""
    if packet[0] >> 4 == 4:
        if table.address4 is None or not _may_answer4(packet):
            return None
        kind = ICMP_ABOUT[reason][0]
        code, mtu = (4, mtu) if reason == TOO_BIG else (0, 0)
        quoted = packet[: ICMP4_MAX - 28]
        total = 28 + len(quoted)
        header = bytearray(struct.pack(">BBHHHBBH", 0x45, 0xC0, total, 0, DF, 64, ICMP, 0))
        header += table.address4 + packet[12:16]
        header[10:12] = checksum(sum_of(header))
        message = bytearray(struct.pack(">BBHHH", kind, code, 0, 0, mtu) + quoted)
        message[2:4] = checksum(sum_of(message))
        return bytes(header + message)
    if table.address6 is None or not _may_answer6(packet, reason):
        return None
    quoted = packet[: ICMP6_MAX - 48]
    header = bytearray(struct.pack(">IHBB", 0x6 << 28, 8 + len(quoted), ICMPV6, 64))
    header += table.address6 + packet[8:24]
    told = max(mtu, 1280) if reason == TOO_BIG else 0
    message = bytearray(struct.pack(">BBHI", ICMP_ABOUT[reason][1], 0, 0, told) + quoted)
    pseudo = sum_of(header[8:40]) + swapped(ICMPV6) + swapped(len(message))
    message[2:4] = checksum(pseudo + sum_of(message))
    return bytes(header + message)
