"""The plain twin of icmp.c: what the sender of a packet that cannot be carried is told."""

from __future__ import annotations

import struct
from ipaddress import IPv4Network, IPv6Address

from flanneld_py.udp import reference
from flanneld_py.udp.reference import ICMP, ICMPV6, Ip, Table, checksum

KINDS = {"no-route": 1, "ttl-exceeded": 2, "too-big": 3}
"""As enum icmp_kind."""

_TYPES4 = {"no-route": (3, 0), "ttl-exceeded": (11, 0), "too-big": (3, 4)}
_TYPES6 = {"no-route": (1, 0), "ttl-exceeded": (3, 0), "too-big": (2, 0)}
_NO_HOST = [IPv4Network(net) for net in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3")]
"""RFC 1122 3.2.2: sources that are not one host."""
_ABOUT_ERRORS = {3, 4, 5, 11, 12}


def error(table: Table, reason: str, mtu: int, packet: bytes) -> bytes | None:
    """The answer to a packet that packet_parse has accepted; None when there must be none."""
    _, ip = reference.parse(packet)
    assert ip is not None  # noqa: S101 (this is the tests' own)
    own = table.addresses.get(ip.version)
    if own is None:
        return None
    if ip.version == 4:
        if not _may_answer4(packet, ip):
            return None
        kind, code = _TYPES4[reason]
        body = _body(kind, code, struct.pack(">HH", 0, mtu if code == 4 else 0), packet[: 576 - 28], b"")
        addresses = own.packed + ip.source.packed
        header = (
            struct.pack(">BBHHHBBH", 0x45, 0xC0, 20 + len(body), 0, reference.DF, 64, ICMP, 0) + addresses
        )
        return reference.put16(header, 10, checksum(header)) + body
    if not _may_answer6(packet, ip, reason):
        return None
    kind, code = _TYPES6[reason]
    quoted = packet[: 1280 - 48]
    pseudo = own.packed + ip.source.packed + struct.pack(">II", 8 + len(quoted), ICMPV6)
    word = struct.pack(">I", max(mtu, 1280) if reason == "too-big" else 0)
    body = _body(kind, code, word, quoted, pseudo)
    return struct.pack(">IHBB", 0x60000000, len(body), ICMPV6, 64) + own.packed + ip.source.packed + body


def _body(kind: int, code: int, word: bytes, quoted: bytes, pseudo: bytes) -> bytes:
    body = struct.pack(">BBH", kind, code, 0) + word + quoted
    return reference.put16(body, 2, checksum(pseudo + body))


def _may_answer4(packet: bytes, ip: Ip) -> bool:
    if any(ip.source in net for net in _NO_HOST) or ip.destination in _NO_HOST[2]:
        return False
    if ip.field & reference.OFFSET:
        return False
    rest = packet[ip.header_length :]
    return ip.protocol != ICMP or (rest != b"" and rest[0] not in _ABOUT_ERRORS)


def _may_answer6(packet: bytes, ip: Ip, reason: str) -> bool:
    if ip.source.is_multicast or ip.source in {IPv6Address("::"), IPv6Address("::1")}:
        return False
    if ip.destination.is_multicast and reason != "too-big":
        return False
    following, rest = ip.protocol, packet[40:]
    while following in reference.EXTENSIONS:
        if len(rest) < 8:
            return False
        size = 8 * (rest[1] + 1)
        if following == reference.FRAGMENT:
            if reference.be16(rest, 2) >> 3:
                return False
            size = 8
        elif following == reference.AUTHENTICATION:
            size = 4 * (rest[1] + 2)
        following, rest = rest[0], rest[size:]
    return following != ICMPV6 or (rest != b"" and rest[0] >= 128 and rest[0] != 137)
