"""The routes of the udp data plane, packed for the pump; the layout is described in packet.h."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Network, collapse_addresses

from msgspec import Struct

from flanneld_py.addresses import Family, IPAddress, IPNetwork, PerFamily, Subnets

MAGIC = b"FPT1"
PORT = 8285
NETWORKS_MAX = 16
MTU_MIN, MTU_MAX = 68, 65507
PEER_IPV6 = 1
HAS_FAMILY: dict[Family, int] = {4: 1, 6: 2}

_HEADER = struct.Struct("<4sIBBHIIIIIIII")
"""Up to the own IPv4 address; IPv6 addresses follow in network order."""

_Range = tuple[int, int, int]
"""First and last address, index of the peer."""


class SourceCheck(IntEnum):
    """Which inner sources a peer may send from; values as in packet.h, names as users write them."""

    FALSE = 0
    TRUE = 1
    STRICT = 2


class Peer(Struct, frozen=True):
    """Another host, and the subnets behind it."""

    address: IPv4Address
    """Its public address, to which datagrams are sent and from which they must come."""
    subnets: tuple[IPNetwork, ...]
    port: int = PORT
    ipv6: bool = False
    """Its record announces that it takes IPv6 packets; without, none go to it."""


class Here(Struct, frozen=True):
    """This host's side of the table."""

    subnets: Subnets
    """What inner destinations of received packets must lie in."""
    addresses: PerFamily[IPAddress]
    """Those of the TUN, the sources of ICMP errors; of the same families as `subnets`."""
    networks: tuple[IPNetwork, ...]
    """What `SourceCheck.TRUE` means by inside the Network."""
    mtu: int
    """Of the TUN, 68 to 65507."""
    source_check: SourceCheck = SourceCheck.TRUE


def pack(here: Here, peers: Iterable[Peer]) -> bytes:
    """The whole table, 20 bytes for a peer with an IPv4 subnet; 10,000 of them take 60 ms.

    Of overlapping subnets the longest prefix counts, of equal ones the first; no address of our own subnets
    leads to a peer. Peers with one address are one: the port and flag of the first count for all.

    Raises:
        ValueError: an MTU, port or address that no table can hold, or too many networks.
    """
    _check(here)
    known: dict[int, Peer] = {}
    behind: dict[Family, list[tuple[IPNetwork, int]]] = {4: [], 6: []}
    for peer in peers:
        address = int(peer.address)
        if known.setdefault(address, peer) is peer and not (address and 0 < peer.port < 65536):
            raise ValueError(
                f"peer {peer.address}:{peer.port}: expected an address and a port from 1 to 65535"
            )
        for subnet in peer.subnets:
            behind[6 if isinstance(subnet, IPv6Network) else 4].append((subnet, address))
    index = {address: place for place, address in enumerate(sorted(known))}
    ranges4 = _outside(here.subnets.v4, _flatten((net, index[address]) for net, address in behind[4]))
    ranges6 = _outside(here.subnets.v6, _flatten((net, index[address]) for net, address in behind[6]))
    networks4, networks6 = _spans(here.networks, 4), _spans(here.networks, 6)
    if max(len(networks4), len(networks6)) > NETWORKS_MAX:
        raise ValueError(f"more than {NETWORKS_MAX} networks of one family")
    counts = (len(index), len(ranges4), len(ranges6), len(networks4), len(networks6))
    body = b"".join(
        (
            *(
                struct.pack(">IH", address, known[address].port) + struct.pack("<H", known[address].ipv6)
                for address in index
            ),
            *(struct.pack("<III", *owned) for owned in ranges4),
            *(_big(first) + _big(last) + struct.pack("<I", peer) for first, last, peer in ranges6),
            *(struct.pack("<II", *network) for network in networks4),
            *(_big(first) + _big(last) for first, last in networks6),
        )
    )
    return _header(here, counts, len(body)) + body


def _spans(networks: Iterable[IPNetwork], family: Family) -> list[tuple[int, int]]:
    """First and last address of the networks of one family, sorted and disjoint."""
    chosen = collapse_addresses(network for network in networks if network.version == family)  # type: ignore[type-var]
    return [(int(network.network_address), int(network.broadcast_address)) for network in chosen]


def _check(here: Here) -> None:
    if not MTU_MIN <= here.mtu <= MTU_MAX:
        raise ValueError(f"MTU {here.mtu}: expected {MTU_MIN} to {MTU_MAX}")
    if [family for family, _ in here.subnets.items()] != [family for family, _ in here.addresses.items()]:
        raise ValueError("own subnets and own addresses are of different families")


def _header(here: Here, counts: Sequence[int], body: int) -> bytes:
    families = sum(HAS_FAMILY[family] for family, _ in here.subnets.items())
    net4, net6 = here.subnets.v4, here.subnets.v6
    own4 = (0, 0, 0) if net4 is None else (int(net4[0]), int(net4[-1]), int(here.addresses.v4 or 0))
    own6 = (0, 0, 0) if net6 is None else (int(net6[0]), int(net6[-1]), int(here.addresses.v6 or 0))
    length = _HEADER.size + 3 * 16 + body
    fixed = (MAGIC, length, here.source_check, families, here.mtu)
    return _HEADER.pack(*fixed, *counts, *own4) + b"".join(map(_big, own6))


def _big(address: int) -> bytes:
    return address.to_bytes(16, "big")


def _flatten(owned: Iterable[tuple[IPNetwork, int]]) -> list[_Range]:
    """Disjoint ranges in order, in which every address belongs to whom the longest prefix gives it.

    Prefixes are nested or disjoint, so one sweep with a stack of those that are open is enough.
    """
    owners: dict[tuple[int, int], int] = {}
    for net, peer in owned:
        owners.setdefault((int(net.network_address), -int(net.broadcast_address)), peer)
    ranges: list[_Range] = []
    open_: list[tuple[int, int]] = []
    at = 0
    for first, negative_last in sorted(owners):
        at = _close(ranges, open_, at, first)
        if open_ and at < first:
            ranges.append((at, first - 1, open_[-1][1]))
        open_.append((-negative_last, owners[first, negative_last]))
        at = first
    _close(ranges, open_, at, None)
    return ranges


def _close(ranges: list[_Range], open_: list[tuple[int, int]], at: int, before: int | None) -> int:
    """Ends the open prefixes that end before an address (None: all). Returns where the undecided begins."""
    while open_ and (before is None or open_[-1][0] < before):
        last, peer = open_.pop()
        if at <= last:
            ranges.append((at, last, peer))
            at = last + 1
    return at


def _outside(own: IPNetwork | None, ranges: Iterable[_Range]) -> list[_Range]:
    """The ranges, without what lies in our own subnet."""
    if own is None:
        return list(ranges)
    begin, end = int(own.network_address), int(own.broadcast_address)
    rest: list[_Range] = []
    for first, last, peer in ranges:
        if last < begin or end < first:
            rest.append((first, last, peer))
            continue
        if first < begin:
            rest.append((first, begin - 1, peer))
        if end < last:
            rest.append((end + 1, last, peer))
    return rest
