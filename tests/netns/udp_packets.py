"""Packets that no kernel would make."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from tests.netns.udp_traffic import ones_sum

EXPERIMENT, IPV4_IN, HOP_BY_HOP, FRAGMENT, OPTIONS6, ICMPV6 = 253, 4, 0, 44, 60, 58
"""Protocols; the first is for experiments (RFC 3692)."""
DF, MF = 0x4000, 0x2000
UNSPECIFIED = "0.0.0.0"  # noqa: S104 - nothing is bound to it


def ipv4(
    source: str,
    target: str,
    payload: bytes = b"",
    *,
    ttl: int = 64,
    protocol: int = EXPERIMENT,
    field: int = 0,
    options: bytes = b"",
) -> bytes:
    """A packet whose header is right. `field`: flags and offset."""
    length = 20 + len(options)
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x40 + length // 4,
        0,
        length + len(payload),
        7,
        field,
        ttl,
        protocol,
        0,
        IPv4Address(source).packed,
        IPv4Address(target).packed,
    )
    return mended(header + options + payload, length)


def mended(packet: bytes, length: int = 20) -> bytes:
    """With the right header checksum."""
    header = packet[:10] + b"\0\0" + packet[12:length]
    return header[:10] + struct.pack(">H", 0xFFFF & ~ones_sum(header)) + packet[12:]


def ipv6(
    source: str, target: str, payload: bytes = b"", *, hops: int = 64, following: int = EXPERIMENT
) -> bytes:
    """The same for IPv6."""
    ends = IPv6Address(source).packed + IPv6Address(target).packed
    return struct.pack(">IHBB", 6 << 28, len(payload), following, hops) + ends + payload


def padding(following: int) -> bytes:
    """An extension header, hop-by-hop or for the destination, that says nothing (PadN, RFC 8200, 4.2)."""
    return bytes([following, 0, 1, 4, 0, 0, 0, 0])


def fragment6(following: int, offset: int, *, more: bool) -> bytes:
    """A fragment header; `offset` in bytes."""
    return struct.pack(">BBHI", following, 0, offset | more, 7)
