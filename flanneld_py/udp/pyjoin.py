"""Joining received packets into super-packets in pypump.py; packet.h says when two may be joined.

One packet after the other is compared as a number, masked to the fields that must be equal in all.
"""

from __future__ import annotations

import struct

from flanneld_py.udp.pypacket import (
    EXTENSIONS,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    PLAIN,
    TCP,
    UDP,
    VNET,
    checksum,
    sum_of,
    swapped,
)

TYPE_CHECKING = False  # without an import of typing
if TYPE_CHECKING:
    from collections.abc import Sequence

_U16, _U32, _LENGTH_SUM = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">HH")
MOST = {TCP: 128, UDP: 64}
"""Packets of one super-packet; UDP_MAX_SEGMENTS of kernels before 6.9."""
LONGEST = 65535
PSH_FIN, ACK = 0x09, 0x10
_masks: dict[tuple[bool, bool, int], int] = {}


def _mask(four: bool, tcp: bool, length: int) -> int:
    """Ones where the headers of a flow's packets must be equal.

    Not in lengths, checksums, identification, sequence number, PSH and FIN.
    """
    try:
        return _masks[four, tcp, length]
    except KeyError:
        pass
    mask, at = bytearray(b"\xff" * length), 20 if four else 40
    differ = [(2, 6), (10, 12)] if four else [(4, 6)]
    differ += [(at + 4, at + 8), (at + 16, at + 18)] if tcp else [(at + 4, at + 8)]
    for begin, end in differ:
        mask[begin:end] = bytes(end - begin)
    if tcp:
        mask[at + 13] = ~PSH_FIN & 0xFF
    return _masks.setdefault((four, tcp, length), int.from_bytes(mask, "little"))


class Entry:
    """Packets of one flow that follow each other, or one packet."""

    __slots__ = (
        "count", "first", "flags", "header", "identification", "mask", "masked", "open", "payload", "pieces",
        "protocol", "pseudo", "sequence", "size", "transport", "verified", "whole",
    )  # fmt: skip

    def __init__(self, packet: memoryview, transport: int, protocol: int, header: int) -> None:
        self.first, self.transport, self.protocol, self.header = packet, transport, protocol, header
        # `header`: length of all headers; 0: it is never joined.
        self.whole, self.pieces = [packet], [packet[header:]]
        self.count = 1
        self.payload = self.size = len(packet) - header
        self.open = header != 0
        self.verified = False
        if not header:
            return
        tcp, four = protocol == TCP, transport == 20
        self.mask = _mask(four, tcp, header)
        self.masked = int.from_bytes(packet[:header], "little") & self.mask
        self.pseudo = sum_of(packet[12:20] if four else packet[8:40]) + swapped(protocol)
        self.identification = -1
        if four and not packet[6] & 0x40:
            self.identification = _U16.unpack_from(packet, 4)[0]
        self.sequence = self.flags = 0
        if tcp:
            self.flags = packet[transport + 13]
            self.sequence = _U32.unpack_from(packet, transport + 4)[0] + self.payload & 0xFFFFFFFF
            self.open = not packet[transport + 13] & PSH_FIN

    def _right(self, packet: memoryview) -> bool:
        """Its transport checksum."""
        rest = len(packet) - self.transport
        return (self.pseudo + swapped(rest) + sum_of(packet[self.transport :])) % 65535 == 0

    def _network_continues(self, packet: memoryview) -> bool:
        """Its own length, checksum and identification: what is not equal in all IP headers."""
        if self.transport == 40:
            return (packet[4] << 8 | packet[5]) + 40 == len(packet)
        if packet[2] << 8 | packet[3] != len(packet) or sum_of(packet[:20]):
            return False
        expected = self.identification
        return expected < 0 or _U16.unpack_from(packet, 4)[0] == expected + self.count & 0xFFFF

    def extend(self, packet: memoryview) -> bool:
        """Append a packet of this flow if cutting would give it again; False: it is not the next one.

        It need not have been checked before: what is equal was checked in the first one.
        """
        header, transport, payload = self.header, self.transport, len(packet) - self.header
        if (
            not self.open
            or not 0 < payload <= self.size
            or int.from_bytes(packet[:header], "little") & self.mask != self.masked
            or self.count == MOST[self.protocol]
            or header + self.payload + payload > LONGEST
            or not self._network_continues(packet)
        ):
            return False
        if self.protocol == TCP:
            last = payload < self.size or packet[transport + 13] & PSH_FIN != 0
            follows = _U32.unpack_from(packet, transport + 4)[0] == self.sequence
        else:
            last = payload < self.size
            length, field = _LENGTH_SUM.unpack_from(packet, transport + 4)
            follows = length == payload + 8 and field != 0
        if follows and not self.verified:
            self.verified = self.open = self._right(self.first)
        if not follows or not self.verified or not self._right(packet):
            return False
        self._append(packet, last)
        return True

    def _append(self, packet: memoryview, last: bool) -> None:
        self.whole.append(packet)
        self.pieces.append(packet[self.header :])
        self.count += 1
        self.payload += len(packet) - self.header
        self.open = not last
        if self.protocol == TCP:
            self.sequence = self.sequence + len(packet) - self.header & 0xFFFFFFFF
            self.flags |= packet[self.transport + 13]

    def super_packet(self) -> Sequence[bytes | bytearray | memoryview]:
        """What to write to the TUN, its vnet header first."""
        if self.count == 1:
            return PLAIN, self.first
        four, tcp, begin = self.transport == 20, self.protocol == TCP, self.transport
        header = bytearray(self.first[: self.header])
        total = self.header + self.payload
        if four:
            _U16.pack_into(header, 2, total)
            header[10:12] = bytes(2)
            header[10:12] = checksum(sum_of(header[:20]))
            kind = GSO_TCPV4 if tcp else GSO_UDP_L4
        else:
            _U16.pack_into(header, 4, total - 40)
            kind = GSO_TCPV6 if tcp else GSO_UDP_L4
        offset = 16 if tcp else 6
        if tcp:
            header[begin + 13] = self.flags
        else:
            _U16.pack_into(header, begin + 4, total - begin)
        pseudo = (self.pseudo + swapped(total - begin)) % 65535
        header[begin + offset : begin + offset + 2] = pseudo.to_bytes(2, "little")
        vnet = VNET.pack(NEEDS_CSUM, kind, self.header, self.size, begin, offset)
        return vnet, header, *self.pieces


def _headers(packet: memoryview, tcp_too: bool, udp_too: bool) -> tuple[int, int, int]:
    """Where TCP or UDP begins, which of them, and the length of all headers, 0 when it is never joined."""
    if packet[0] >> 4 == 4:
        transport, protocol = (packet[0] & 15) * 4, packet[9]
        plain = transport == 20 and not _U16.unpack_from(packet, 6)[0] & 0xBFFF
    else:
        transport, protocol, plain = 40, packet[6], True
    length = len(packet)
    if plain and protocol == TCP and tcp_too and length > transport + 20:
        header = transport + (packet[transport + 12] >> 4) * 4
        if transport + 20 <= header < length and packet[transport + 13] & ~PSH_FIN & 0xFF == ACK:
            return transport, protocol, header
    elif plain and protocol == UDP and udp_too and length > transport + 8:
        rest, field = _LENGTH_SUM.unpack_from(packet, transport + 4)
        if rest == length - transport and field:
            return transport, protocol, transport + 8
    return transport, protocol, 0


class Joiner:
    """The packets of a batch as they came; entries are written in order, so no flow is reordered."""

    def __init__(self, *, tcp: bool, udp: bool) -> None:
        self._tcp, self._udp = tcp, udp
        self.entries: list[Entry] = []
        self._open: dict[bytes, Entry] = {}

    def add(self, packet: memoryview) -> Entry:
        """A packet that was accepted; returns where it went, which may take the next one as well."""
        transport, protocol, header = _headers(packet, self._tcp, self._udp)
        if packet[0] >> 4 == 4:
            key = bytes(packet[9:10]) + packet[12:20]
            hidden = _U16.unpack_from(packet, 6)[0] & 0x3FFF != 0
        else:
            key = bytes(packet[6:7]) + packet[8:40]
            hidden = protocol in EXTENSIONS
        if hidden:  # it may be of any flow: its ports cannot be seen
            self._open.clear()
        elif protocol in MOST and len(packet) >= transport + 8:
            key += packet[transport : transport + 4]
            known = self._open.get(key)
            if known is not None and known.extend(packet):
                return known
            self._open.pop(key, None)
        entry = Entry(packet, transport, protocol, header)
        self.entries.append(entry)
        if header:
            self._open[key] = entry
        return entry
