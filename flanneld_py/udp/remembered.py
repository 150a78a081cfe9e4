"""What a pump was working with, for the next process: it forwards again before it knows anything else.

A header, JSON with the settings, and the packed table as packet.h has it. Never stronger than the registry:
the reconciler compares what is taken over with what should be, like everything else that it finds.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from typing import Any, NamedTuple, get_args

from flanneld_py.addresses import IPNetwork, PerFamily
from flanneld_py.datapath import Endpoint, Plane, PumpSettings, SourceCheck
from flanneld_py.udp.resume import CUT, Cut

TABLE = struct.Struct("<4sIBBHIII8x")
"""Of a packed table: magic, length, source check, families, MTU, peers, ranges of each family."""
FIRST_PEER = 92
PEER4 = struct.Struct(">IH")
RANGE4 = struct.Struct("<III")
RANGE6 = struct.Struct("<16s16sI")


class Remembered(NamedTuple):
    """A pump's work."""

    prefix: str
    """Of the daemon that it was for."""
    device: str
    settings: PumpSettings
    rows: dict[IPNetwork, Endpoint]


def render(prefix: str, device: str, settings: PumpSettings, table: bytes) -> bytes:
    """All of it, with a checksum: the writer may be killed half-way."""
    text = json.dumps(
        {
            "prefix": prefix,
            "device": device,
            "address": str(settings.address),
            "port": settings.port,
            "subnets": [str(net) for net in settings.subnets.values()],
            "networks": [str(net) for net in settings.networks],
            "mtu": settings.mtu,
            "plane": settings.plane,
            "source_check": settings.source_check,
        }
    ).encode()
    body = text + table
    return CUT.pack(b"FPR1", zlib.crc32(body), len(text), len(table), settings.plane.encode()) + body


def parse(cut: Cut) -> Remembered | None:
    """None for anything that is not whole, or of another version."""
    try:
        told = json.loads(cut.text)
        subnets = {net.version: net for net in map(ip_network, told["subnets"])}
        settings = PumpSettings(
            address=IPv4Address(told["address"]),
            port=int(told["port"]),
            subnets=PerFamily(subnets.get(4), subnets.get(6)),
            networks=tuple(map(ip_network, told["networks"])),
            mtu=int(told["mtu"]),
            plane=_one_of(Plane, told["plane"]),
            source_check=_one_of(SourceCheck, told["source_check"]),
        )
        return Remembered(told["prefix"], told["device"], settings, dict(_rows(cut.table)))
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, StopIteration):
        return None


def _one_of(kind: Any, value: object) -> Any:
    return next(name for name in get_args(kind) if name == value)


def _rows(table: bytes) -> Iterator[tuple[IPNetwork, Endpoint]]:
    """Those that are whole prefixes; an odd piece is the rest of one that another overlaps."""
    _, _, _, _, _, peers, ranges4, ranges6 = TABLE.unpack_from(table)
    ends = []
    for place in range(FIRST_PEER, FIRST_PEER + 8 * peers, 8):
        address, port = PEER4.unpack_from(table, place)
        ends.append(Endpoint(IPv4Address(address), port, bool(table[place + 6] & 1)))
    place = FIRST_PEER + 8 * peers
    for first, last, peer in RANGE4.iter_unpack(table[place : place + RANGE4.size * ranges4]):
        if (length := _length(first, last, 32)) is not None:
            yield IPv4Network((first, length)), ends[peer]
    place += RANGE4.size * ranges4
    for low, high, peer in RANGE6.iter_unpack(table[place : place + RANGE6.size * ranges6]):
        first, last = int.from_bytes(low, "big"), int.from_bytes(high, "big")
        if (length := _length(first, last, 128)) is not None:
            yield IPv6Network((first, length)), ends[peer]


def _length(first: int, last: int, bits: int) -> int | None:
    size = last - first + 1
    aligned = size & (size - 1) == 0 and first % size == 0
    return bits + 1 - size.bit_length() if aligned else None
