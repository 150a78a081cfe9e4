"""The packed table as pypump.py looks things up in it; the layout is described in packet.h."""

from __future__ import annotations

import struct
from _bisect import bisect_right
from _socket import AF_INET, inet_ntop

HEADER = 92
NETWORKS_MAX = 16
CACHED = 4096
"""Looked-up addresses that are remembered."""

Spans = tuple[list[int], list[int], list[int]]
"""First addresses, sorted; last addresses; what belongs to them."""


def _spans(rows: list[tuple[int, int, int]], name: str, peers: int) -> Spans:
    after = -1
    for first, last, peer in rows:
        if not after < first <= last:
            raise ValueError(f"{name}: not sorted, or overlapping")
        if peer >= peers:
            raise ValueError(f"{name}: no such peer")
        after = last
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _find(spans: Spans, address: int) -> int | None:
    place = bisect_right(spans[0], address) - 1
    return spans[2][place] if place >= 0 and address <= spans[1][place] else None


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


class Table:
    """Of one moment. `ports[i]`, `flags[i]`, `addresses[i]` belong to peer i.

    Raises:
        ValueError: anything is wrong with it.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < HEADER:
            raise ValueError("shorter than its header")
        magic, length, check, families, mtu, *counts = struct.unpack_from("<4sIBBH5I", data)
        if magic != b"FPT1" or length != len(data) or check > 2 or families > 3 or not 68 <= mtu <= 65507:
            raise ValueError("header: magic, length, source check, families or MTU")
        sizes = (8, 12, 36, 8, 32)
        if HEADER + sum(size * count for size, count in zip(sizes, counts, strict=True)) != length:
            raise ValueError("counts: do not make up the length")
        if max(counts[3:]) > NETWORKS_MAX:
            raise ValueError("networks: more than 16 of a family")
        parts, at = [], HEADER
        for size, count in zip(sizes, counts, strict=True):
            parts.append(data[at : at + size * count])
            at += size * count
        self.mtu, self.source_check = mtu, check
        first4, last4, address4 = struct.unpack_from("<III", data, 32)
        first6, last6 = _big(data[44:60]), _big(data[60:76])
        if first4 > last4 or first6 > last6:
            raise ValueError("own subnet: ends before it begins")
        self.own4 = (first4, last4) if families & 1 else None
        self.own6 = (first6, last6) if families & 2 else None
        self.address4 = address4.to_bytes(4, "big") if families & 1 else None
        self.address6 = data[76:92] if families & 2 else None
        self._read_peers(parts[0])
        rows6 = [(_big(a), _big(b), peer) for a, b, peer in struct.iter_unpack("<16s16sI", parts[2])]
        networks6 = [(_big(a), _big(b), 0) for a, b in struct.iter_unpack("<16s16s", parts[4])]
        self._ranges4 = _spans(list(struct.iter_unpack("<III", parts[1])), "ranges4", counts[0])
        self._ranges6 = _spans(rows6, "ranges6", counts[0])
        self._networks4 = _spans([(*row, 0) for row in struct.iter_unpack("<II", parts[3])], "networks4", 1)
        self._networks6 = _spans(networks6, "networks6", 1)
        self._owners: dict[bytes, int | None] = {}

    def _read_peers(self, part: bytes) -> None:
        rows = list(struct.iter_unpack("<4s2sH", part))
        self.addresses: list[bytes] = [row[0] for row in rows]
        if any(a >= b for a, b in zip(self.addresses, self.addresses[1:], strict=False)):
            raise ValueError("peers: not sorted, or twice the same")
        self.ports = [_big(row[1]) for row in rows]
        self.flags: list[int] = [row[2] for row in rows]
        if not all(self.ports) or (self.addresses and not any(self.addresses[0])):
            raise ValueError("peers: address or port is 0")
        if any(flags > 1 for flags in self.flags):
            raise ValueError("peers: unknown flags")
        self._by_address = {address: peer for peer, address in enumerate(self.addresses)}

    def sender(self, address: bytes) -> int | None:
        """The peer with an outer address."""
        return self._by_address.get(address)

    def target(self, peer: int) -> tuple[str, int]:
        """Where its datagrams go."""
        return inet_ntop(AF_INET, self.addresses[peer]), self.ports[peer]

    def owner(self, address: bytes) -> int | None:
        """The peer an inner address belongs to, of 4 or 16 bytes."""
        try:
            return self._owners[address]
        except KeyError:
            pass
        found = _find(self._ranges4 if len(address) == 4 else self._ranges6, _big(address))
        if len(self._owners) >= CACHED:
            self._owners.clear()
        self._owners[address] = found
        return found

    def is_ours(self, address: bytes) -> bool:
        """Inside our own subnet."""
        own = self.own4 if len(address) == 4 else self.own6
        return own is not None and own[0] <= _big(address) <= own[1]

    def may_send(self, peer: int, source: bytes) -> bool:
        """SourceCheck of an inner source."""
        if self.source_check == 0 or self.owner(source) == peer:
            return True
        networks = self._networks4 if len(source) == 4 else self._networks6
        return self.source_check == 1 and _find(networks, _big(source)) is None
