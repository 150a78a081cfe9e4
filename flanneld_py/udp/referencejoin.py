"""The plain twin of join.c: which received packets become one super-packet."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

from msgspec import Struct

from flanneld_py.udp import reference
from flanneld_py.udp.reference import ACK, FIN, OFFSET, PSH, TCP, UDP, Ip, Vnet, be16

MOST_SEGMENTS, MOST_DATAGRAMS, LONGEST = 128, 64, 65535
ENTRIES, PIECES = 256, 1024

Flow: TypeAlias = tuple[int, IPv4Address | IPv6Address, IPv4Address | IPv6Address, bytes]
"""Protocol, addresses, ports."""


class Entry(Struct):
    """Packets that are written to the TUN together."""

    packets: list[bytes]
    header_length: int = 0
    """0: it stays alone."""

    def payload(self, number: int) -> int:
        return len(self.packets[number]) - self.header_length


def join(packets: list[bytes], *, tcp: bool = True, udp: bool = True) -> list[Entry]:
    """The entries of a batch, in order. At most what a joiner takes at once."""
    entries: list[Entry] = []
    open_: dict[Flow | None, Entry] = {}
    for packet in packets:
        _, ip = reference.parse(packet)
        assert ip is not None  # noqa: S101 (this is the tests' own)
        if ip.field & (reference.MF | OFFSET) or (ip.version == 6 and ip.protocol in reference.EXTENSIONS):
            open_.clear()
        flow = _flow(packet, ip)
        length = _headers(packet, ip) if {TCP: tcp, UDP: udp}.get(ip.protocol) else 0
        entry = open_.pop(flow, None)
        if length and entry is not None and _continues(entry, packet, length, ip):
            entry.packets.append(packet)
            if entry.payload(-1) == entry.payload(0) and not _ends(packet, ip):
                open_[flow] = entry
            continue
        entries.append(Entry([packet], length))
        if length and not _ends(packet, ip):
            open_[flow] = entries[-1]
    return entries


def _flow(packet: bytes, ip: Ip) -> Flow | None:
    least = {TCP: 20, UDP: 8}.get(ip.protocol, LONGEST)
    if len(packet) < ip.header_length + least:
        return None
    return ip.protocol, ip.source, ip.destination, packet[ip.header_length :][:4]


def _headers(packet: bytes, ip: Ip) -> int:
    """The length of all headers of a packet that may be joined, else 0."""
    at = ip.header_length
    transport = packet[at:]
    if ip.version == 4 and (at != 20 or ip.field & ~reference.DF):
        return 0
    if ip.protocol == UDP and len(transport) > 8:
        return at + 8 if be16(transport, 4) == len(transport) and be16(transport, 6) else 0
    if ip.protocol == TCP and len(transport) > 20:
        length = transport[12] // 16 * 4
        return at + length if 20 <= length < len(transport) and transport[13] & ~(PSH | FIN) == ACK else 0
    return 0


def _ends(packet: bytes, ip: Ip) -> bool:
    return ip.protocol == TCP and bool(packet[ip.header_length + 13] & (PSH | FIN))


def _checksum_right(packet: bytes, ip: Ip) -> bool:
    transport = packet[ip.header_length :]
    return reference.checksum(reference.pseudo_header(ip, ip.protocol, len(transport)) + transport) == 0


def _continues(entry: Entry, packet: bytes, length: int, ip: Ip) -> bool:
    """Checksums are right, and cutting the entry with this packet gives this packet."""
    most = MOST_SEGMENTS if ip.protocol == TCP else MOST_DATAGRAMS
    together = entry.header_length + sum(map(entry.payload, range(len(entry.packets)))) + len(packet) - length
    if length != entry.header_length or len(packet) - length > entry.payload(0):
        return False
    if len(entry.packets) >= most or together > LONGEST:
        return False
    if not all(_checksum_right(one, ip) for one in (entry.packets[0], packet)):
        return False
    joined = reference.segments(merge([*entry.packets, packet], length), _vnet(entry, ip))
    if joined is None:
        return False
    return _comparable(joined[-1], ip) == _comparable(packet, ip)


def _comparable(packet: bytes, ip: Ip) -> bytes:
    """Without what may differ: checksums, looked at elsewhere, and an identification without meaning."""
    at = ip.header_length + (6 if ip.protocol == UDP else 16)
    packet = reference.put16(packet, at, 0)
    if ip.version == 6:
        return packet
    packet = reference.put16(packet, 10, 0)
    return reference.put16(packet, 4, 0) if ip.field & reference.DF else packet


def merge(packets: list[bytes], header_length: int) -> bytes:
    """The super-packet of some packets, its checksum field not yet set."""
    first, last = packets[0], packets[-1]
    header = first[:header_length]
    _, ip = reference.parse(first)
    assert ip is not None  # noqa: S101
    whole = header + b"".join(packet[header_length:] for packet in packets)
    at = ip.header_length
    if ip.protocol == TCP:
        whole = reference.put(whole, at + 13, bytes([header[at + 13] | last[at + 13]]))
    return reference.complete(whole, at, ip.protocol)


def _vnet(entry: Entry, ip: Ip) -> Vnet:
    tcp = ip.protocol == TCP
    kind = (reference.GSO_TCPV4 if ip.version == 4 else reference.GSO_TCPV6) if tcp else reference.GSO_UDP
    start, offset = ip.header_length, 16 if tcp else 6
    return Vnet(reference.NEEDS_CSUM, kind, entry.header_length, entry.payload(0), start, offset)


def written(entry: Entry) -> tuple[Vnet, bytes]:
    """What the TUN gets for an entry."""
    if len(entry.packets) == 1:
        return Vnet(), entry.packets[0]
    whole = merge(entry.packets, entry.header_length)
    _, ip = reference.parse(whole)
    assert ip is not None  # noqa: S101
    vnet = _vnet(entry, ip)
    length = len(whole) - ip.header_length
    sum_of_pseudo = reference.checksum(reference.pseudo_header(ip, ip.protocol, length)) ^ 0xFFFF
    return vnet, reference.put16(whole, vnet.csum_start + vnet.csum_offset, sum_of_pseudo)
