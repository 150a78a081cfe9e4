"""The rtnetlink messages of the bulk tables as bytes (rtnetlink(7), linux/{rtnetlink,neighbour,nexthop}.h).

Pure functions. With ten thousand peers forty thousand messages are made and read, so what is fixed about a
message stands in one `struct` format. Both families in each; devices are indexes here.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeAlias

from flanneld_py.addresses import Family, IPAddress, IPNetwork
from flanneld_py.drivers.netlink import (
    ATTRIBUTE,
    HEADER,
    NLA_F_NESTED,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    U32,
    attribute,
    message,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106

AF_UNSPEC, AF_BRIDGE = 0, 7
AF: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}

IFINFOMSG = struct.Struct("=BxHiII")
"""Family, type, index, flags, change mask."""
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_TXQLEN = 1, 3, 4, 13
IFLA_LINKINFO, IFLA_IFALIAS, IFLA_EXT_MASK = 18, 20, 29
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
RTEXT_FILTER_SKIP_STATS = 8

IFADDRMSG = struct.Struct("=BBBBI")
"""Family, prefix length, flags, scope, index."""

NDMSG = struct.Struct("=BxxxiHBB")
"""Family, index, state, flags, type."""
NDA_DST, NDA_LLADDR, NDA_PORT, NDA_VNI, NDA_IFINDEX, NDA_NH_ID = 1, 2, 6, 7, 8, 13
NUD_INCOMPLETE, NUD_FAILED, NUD_PERMANENT = 0x01, 0x20, 0x80
NTF_SELF = 0x02

RTMSG = struct.Struct("=BBBBBBBBI")
"""Family, destination length, source length, TOS, table, protocol, scope, type, flags."""
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_METRICS, RTA_MULTIPATH, RTA_VIA, RTA_NH_ID = (
    1,
    4,
    5,
    6,
    8,
    9,
    18,
    30,
)
RTAX_LOCK = 1
RT_TABLE_MAIN = 254
RT_SCOPE_UNIVERSE, RT_SCOPE_NOWHERE = 0, 255
RTN_UNICAST, RTN_LOCAL, RTN_BLACKHOLE = 1, 2, 6
RTNH_F_DEAD, RTNH_F_ONLINK, RTNH_F_LINKDOWN = 1, 4, 16
RTPROT_KERNEL, RTPROT_BOOT, RTPROT_STATIC = 2, 3, 4
PROTOCOLS = {
    RTPROT_KERNEL: "kernel",
    RTPROT_BOOT: "boot",
    RTPROT_STATIC: "static",
    9: "ra",
    11: "zebra",
    12: "bird",
    16: "dhcp",
    18: "keepalived",
    42: "babel",
    186: "bgp",
    187: "isis",
    188: "ospf",
    189: "rip",
}
"""RTPROT_* of linux/rtnetlink.h, as `ip route` calls them; left out are those that no route bears."""
RTM_F_CLONED = 0x200
BLACKHOLE_METRIC = 0x7FFF_FFFF
"""Of our blackhole routes: every other route to the same destination is better, such as a bridge's own.

At metric 0, where flannel puts them, they would compete with it.
"""
NO_ROUTES = (errno.ENOENT, errno.EOPNOTSUPP)
"""Errors of a dump: table main is made with its first route; a kernel may be without IPv6."""
METRIC: dict[int, int] = {4: 0, 6: 1024}
"""IP version → the metric of a route made without RTA_PRIORITY (IPv6: IP6_RT_PRIO_USER)."""

RTNEXTHOP = struct.Struct("=HBBi")
"""Length with its attributes, flags, hops, device index."""

NHMSG = struct.Struct("=BBBxI")
"""Family, scope, protocol, flags."""
NHA_ID, NHA_OIF, NHA_GATEWAY = 1, 5, 6

CREATE_REPLACE = NLM_F_CREATE | NLM_F_REPLACE

NeighbourRow: TypeAlias = tuple[int, IPAddress, str]
"""Of a neighbour or FDB table: device, destination, MAC."""

# What is before and between the addresses of a message, of which most are for one device, is packed once.
_LLADDR = ATTRIBUTE.pack(10, NDA_LLADDR)
_PADDING = bytes(2)
"""After a MAC."""
_ROUTE4_NEXTHOP, _ROUTE4_OIF = ATTRIBUTE.pack(8, RTA_NH_ID), ATTRIBUTE.pack(8, RTA_OIF)

# Whole messages. Header (IHHII), then the body as above, then attributes (HH and payload, padded).
_ROUTE6 = struct.Struct("=IHHII BBBBBBBBI HH16s HHI HH16s HHHHI")
_DIRECT_ROUTE6 = struct.Struct("=IHHII BBBBBBBBI HH16s HHI HHHHI")
_BLACKHOLE: dict[int, struct.Struct] = {
    4: struct.Struct("=IHHII BBBBBBBBI HH4s HHI HHHHI"),
    6: struct.Struct("=IHHII BBBBBBBBI HH16s HHI HHHHI"),
}
_MARK = (12, RTA_METRICS | NLA_F_NESTED, 8, RTAX_LOCK)
"""Before the value of a mark."""
_SET_FLAGS = NLM_F_REQUEST | CREATE_REPLACE
_NEW_FLAGS = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL


def mac_bytes(mac: str) -> bytes:
    """`82:4b:b1:2c:8f:a1` as 6 bytes.

    Raises:
        ValueError: it is not six pairs of hex digits.
    """
    packed = bytes.fromhex(mac.replace(":", ""))
    if len(packed) != 6:
        raise ValueError(f"{mac!r} is not a MAC address, expected six pairs of hex digits")
    return packed


def address(packed: bytes) -> IPAddress:
    """An address of 4 or 16 bytes in network order."""
    number = int.from_bytes(packed, "big")
    return IPv4Address(number) if len(packed) == 4 else IPv6Address(number)


def network(packed: bytes, length: int) -> IPNetwork:
    """A network from its base address of 4 or 16 bytes and its length in bits."""
    number = int.from_bytes(packed, "big")
    return IPv4Network((number, length)) if len(packed) == 4 else IPv6Network((number, length))


class Inside:
    """Tells whether packed addresses lie inside some networks, without making objects of them."""

    def __init__(self, networks: Iterable[IPNetwork]) -> None:
        self._prefixes: dict[int, list[tuple[int, int, int]]] = {4: [], 16: []}
        for outer in networks:
            shift = outer.max_prefixlen - outer.prefixlen
            prefix = int(outer.network_address) >> shift
            self._prefixes[outer.max_prefixlen // 8].append((shift, prefix, outer.prefixlen))

    def address(self, packed: bytes) -> bool:
        return self.network(packed, 8 * len(packed))

    def network(self, packed: bytes, length: int) -> bool:
        number = int.from_bytes(packed, "big")
        return any(
            length >= outer and number >> shift == prefix
            for shift, prefix, outer in self._prefixes.get(len(packed), ())
        )


ALL_LINKS = IFINFOMSG.pack(AF_UNSPEC, 0, 0, 0, 0) + attribute(
    IFLA_EXT_MASK, U32.pack(RTEXT_FILTER_SKIP_STATS)
)
"""The body of a dump request, without statistics."""
LINKS_OF_KIND: dict[str, bytes] = {
    kind: ALL_LINKS + attribute(IFLA_LINKINFO | NLA_F_NESTED, attribute(IFLA_INFO_KIND, kind.encode()))
    for kind in ("vxlan", "tun")
}
"""Kind of an overlay's device → the same for devices of that kind."""


def _neighbour_head(size: int, family: int, index: int, flags: int, kind: int) -> bytes:
    """All before the destination, of `size` bytes, of a permanent entry that is set."""
    return (
        HEADER.pack(44 + size, RTM_NEWNEIGH, _SET_FLAGS, 0, 0)
        + NDMSG.pack(family, index, NUD_PERMANENT, flags, kind)
        + ATTRIBUTE.pack(4 + size, NDA_DST)
    )


@lru_cache(maxsize=64)
def _head_of_neighbour(size: int, index: int) -> bytes:
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    return _neighbour_head(size, family, index, 0, RTN_UNICAST)


@lru_cache(maxsize=64)
def _head_of_fdb_entry(size: int, index: int) -> bytes:
    return _neighbour_head(size, AF_BRIDGE, index, NTF_SELF, 0)


def _set_entries(head: Callable[[int, int], bytes], rows: Iterable[NeighbourRow]) -> list[bytes]:
    return [
        head(len(packed := destination.packed), index) + packed + _LLADDR + mac_bytes(mac) + _PADDING
        for index, destination, mac in rows
    ]


def set_neighbours(rows: Iterable[NeighbourRow]) -> list[bytes]:
    """Permanent neighbour entries, each in the place of any other for that address.

    Raises:
        ValueError: one of the MACs is none.
    """
    return _set_entries(_head_of_neighbour, rows)


def set_fdb(rows: Iterable[NeighbourRow]) -> list[bytes]:
    """Permanent FDB entries of vxlan devices; one with another destination is moved to this one.

    Raises:
        ValueError: one of the MACs is none.
    """
    return _set_entries(_head_of_fdb_entry, rows)


def delete_neighbour(index: int, destination: IPAddress) -> bytes:
    body = NDMSG.pack(AF[destination.version], index, NUD_PERMANENT, 0, RTN_UNICAST)
    return message(RTM_DELNEIGH, 0, body + attribute(NDA_DST, destination.packed))


def delete_fdb(index: int, mac: str) -> bytes:
    """Delete the whole entry: without NDA_DST vxlan removes all of its destinations."""
    body = NDMSG.pack(AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF, 0)
    return message(RTM_DELNEIGH, 0, body + attribute(NDA_LLADDR, mac_bytes(mac)))


def set_nexthop(number: int, protocol: int, index: int, via: IPAddress, *, onlink: bool, new: bool) -> bytes:
    """A nexthop object; `new`: refuse if the id is taken, else put this in its place."""
    packed = via.packed
    head, middle = _nexthop_parts(len(packed), protocol, index, onlink, new)
    return head + U32.pack(number) + middle + packed


@lru_cache(maxsize=64)
def _nexthop_parts(size: int, protocol: int, index: int, onlink: bool, new: bool) -> tuple[bytes, bytes]:
    """What is before the number and what is before the gateway, of `size` bytes."""
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    head = (
        HEADER.pack(44 + size, RTM_NEWNEXTHOP, _NEW_FLAGS if new else _SET_FLAGS, 0, 0)
        + NHMSG.pack(family, 0, protocol, RTNH_F_ONLINK if onlink else 0)
        + ATTRIBUTE.pack(8, NHA_ID)
    )
    return head, ATTRIBUTE.pack(8, NHA_OIF) + U32.pack(index) + ATTRIBUTE.pack(4 + size, NHA_GATEWAY)


def delete_nexthop(number: int) -> bytes:
    return message(RTM_DELNEXTHOP, 0, NHMSG.pack(AF_UNSPEC, 0, 0, 0) + attribute(NHA_ID, U32.pack(number)))


def set_route4(destination: IPNetwork, protocol: int, nexthop: int, *, new: bool) -> bytes:
    """An IPv4 route through a nexthop object; `new`: refuse if one with metric 0 stands, else replace it."""
    head = _route4_head(destination.prefixlen, protocol, new)
    return head + destination.network_address.packed + _ROUTE4_NEXTHOP + U32.pack(nexthop)


@lru_cache(maxsize=64)
def _route4_head(length: int, protocol: int, new: bool) -> bytes:
    """All before the destination of a route with two attributes of 8 bytes."""
    return (
        HEADER.pack(44, RTM_NEWROUTE, _NEW_FLAGS if new else _SET_FLAGS, 0, 0)
        + RTMSG.pack(socket.AF_INET, length, 0, 0, RT_TABLE_MAIN, protocol, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
        + ATTRIBUTE.pack(8, RTA_DST)
    )


def set_direct_route4(destination: IPNetwork, protocol: int, index: int, *, new: bool) -> bytes:
    """An IPv4 route to a device, without a gateway or nexthop object; `new` as before."""
    head = _route4_head(destination.prefixlen, protocol, new)
    return head + destination.network_address.packed + _ROUTE4_OIF + U32.pack(index)


def set_direct_route6(destination: IPNetwork, protocol: int, index: int, mark: int, *, new: bool) -> bytes:
    """An IPv6 route to a device, without a gateway; `new` as before, `mark` as below."""
    return _DIRECT_ROUTE6.pack(
        _DIRECT_ROUTE6.size, RTM_NEWROUTE, _NEW_FLAGS if new else _SET_FLAGS, 0, 0,
        socket.AF_INET6, destination.prefixlen, 0, 0,
        RT_TABLE_MAIN, protocol, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0,
        20, RTA_DST, destination.network_address.packed, 8, RTA_OIF, index, *_MARK, mark,
    )  # fmt: skip


def set_route6(
    destination: IPNetwork, protocol: int, index: int, via: IPAddress, mark: int, *, onlink: bool, new: bool
) -> bytes:
    """An IPv6 route; `new`: refuse if one with the default metric is there, else replace it.

    `mark`: of core/ownership.

    Its gateway stands inline. Nexthop objects serve to escape IPv4's fib_info hash, which ignores the
    gateway, so that many routes through one device share one chain and cost O(n²); IPv6 has no such hash.
    """
    return _ROUTE6.pack(
        _ROUTE6.size, RTM_NEWROUTE, _NEW_FLAGS if new else _SET_FLAGS, 0, 0,
        socket.AF_INET6, destination.prefixlen, 0, 0,
        RT_TABLE_MAIN, protocol, RT_SCOPE_UNIVERSE, RTN_UNICAST, RTNH_F_ONLINK if onlink else 0,
        20, RTA_DST, destination.network_address.packed, 8, RTA_OIF, index, 20, RTA_GATEWAY, via.packed,
        *_MARK, mark,
    )  # fmt: skip


def set_blackhole(destination: IPNetwork, protocol: int, mark: int) -> bytes:
    """A route that drops packets, at a metric of its own; refused if one stands there."""
    packed = destination.network_address.packed
    whole = _BLACKHOLE[destination.version]
    return whole.pack(
        whole.size, RTM_NEWROUTE, _NEW_FLAGS, 0, 0,
        AF[destination.version], destination.prefixlen, 0, 0,
        RT_TABLE_MAIN, protocol, RT_SCOPE_UNIVERSE, RTN_BLACKHOLE, 0,
        4 + len(packed), RTA_DST, packed, 8, RTA_PRIORITY, BLACKHOLE_METRIC, *_MARK, mark,
    )  # fmt: skip


def delete_route(destination: IPNetwork, protocol: int, tos: int, metric: int) -> bytes:
    """Delete the route to a destination, of whatever type and gateway, if it has this protocol and metric."""
    body = RTMSG.pack(
        AF[destination.version], destination.prefixlen, 0, tos,
        RT_TABLE_MAIN, protocol, RT_SCOPE_NOWHERE, 0, 0,
    ) + attribute(RTA_DST, destination.network_address.packed)  # fmt: skip
    if metric:
        body += attribute(RTA_PRIORITY, U32.pack(metric))
    return message(RTM_DELROUTE, 0, body)
