"""Packets made to do harm, each with what is wrong with it. See test_udp_hostile.py."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.netns.udp_packets import (
    EXPERIMENT,
    FRAGMENT,
    HOP_BY_HOP,
    ICMPV6,
    UNSPECIFIED,
    fragment6,
    ipv4,
    ipv6,
    mended,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

Crafted = list[tuple[str, bytes]]
"""Reason and packet."""
BAD, GOOD, LONE = b"evil-one", b"let-pass", b"kernel's"
"""What each payload begins with: never to arrive; to arrive; what the pump lets pass and the kernel drops."""


def malformed(source: str, target: str, source6: str, target6: str) -> Crafted:
    """Reason and packet, whoever sends it."""
    good = ipv4(source, target, BAD * 10)
    six = ipv6(source6, target6, BAD * 10)
    jumbogram = ipv6(source6, target6, b"", following=HOP_BY_HOP) + b"\xfd\0\xc2\4\0\1\0\0" + BAD * 10
    return [
        ("too-short", b""),
        ("too-short", good[:1]),
        ("too-short", good[:19]),
        ("too-short", six[:39]),
        ("version", b"\x05" + good[1:]),
        ("version", b"\x55" + good[1:]),
        ("version", b"\xf5" + good[1:]),
        ("header-length", b"\x40" + good[1:]),
        ("header-length", b"\x44" + good[1:]),
        ("header-length", b"\x4f" + good[1:40]),
        ("total-length", good[:-1]),
        ("total-length", good + b"\0"),
        ("total-length", mended(good[:2] + b"\0\0" + good[4:])),
        ("total-length", six[:-1]),
        ("total-length", six + b"\0"),
        ("total-length", jumbogram),
    ]


def wrong_on_arrival(source: str, target: str, source6: str, target6: str) -> Crafted:
    good = ipv4(source, target, BAD * 10)
    optioned = ipv4(source, target, BAD * 10, options=b"\1\1\1\0")
    return [
        *malformed(source, target, source6, target6),
        ("header-checksum", good[:10] + b"\0\0" + good[12:]),
        ("header-checksum", good[:11] + bytes([good[11] ^ 1]) + good[12:]),
        ("header-checksum", optioned[:20] + b"\7" + optioned[21:]),
        ("ttl-zero", ipv4(source, target, BAD, ttl=0)),
        ("ttl-zero", ipv6(source6, target6, BAD, hops=0)),
    ]


def mutated(packets: Sequence[bytes], number: int, seed: int) -> list[bytes]:
    """Some octets changed, or the end cut off or added to; of IPv4 half with a right header checksum."""
    dice = random.Random(seed)
    found: list[bytes] = []
    while len(found) < number:
        packet = bytearray(dice.choice(packets))
        for _ in range(dice.choice([0, 1, 1, 2, 8])):
            packet[dice.randrange(min(len(packet), 60))] = dice.choice(
                [0, 1, 0x45, 0x60, 0x7F, 0xFF, dice.getrandbits(8)]
            )
        if dice.random() < 0.3:
            packet = packet[: dice.randrange(1, len(packet) + 1)] + bytes(dice.choice([0, 0, 1, 40]))
        data = bytes(packet)
        if len(data) >= 20 and data[0] == 0x45 and dice.random() < 0.5:
            data = mended(data)
        found.append(data)
    return found


def silent(source: str, source6: str, nobody: str, nobody6: str) -> list[bytes]:
    """No answer may be given to these (RFC 1122, 3.2.2; RFC 4443, 2.4)."""
    quoted, quoted6 = ipv4(nobody, source, BAD), ipv6(nobody6, source6, BAD)
    return [
        ipv4(source, nobody, BAD, field=3),
        *(ipv4(source, nobody, bytes([kind]) + bytes(7) + quoted, protocol=1) for kind in (3, 4, 5, 11, 12)),
        ipv6(source6, nobody6, fragment6(EXPERIMENT, 8, more=False) + BAD, following=FRAGMENT),
        *(
            ipv6(source6, nobody6, bytes([kind]) + bytes(7) + quoted6, following=ICMPV6)
            for kind in (1, 2, 3, 4, 137)
        ),
    ]


def no_single_sender(nobody: str, nobody6: str) -> list[bytes]:
    """Nor to these, which have no sender that could hear it."""
    groups = ["224.0.0.1", "255.255.255.255", UNSPECIFIED, "127.0.0.1", "240.0.0.1"]
    return [
        *(ipv4(address, nobody, BAD) for address in groups),
        *(ipv6(address, nobody6, BAD) for address in ("ff02::1", "::", "::1")),
    ]
