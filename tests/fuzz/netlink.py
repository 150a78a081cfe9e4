"""What a strange kernel may answer about links, addresses, routes, neighbours, nexthops, or tell unasked."""

from __future__ import annotations

import atexit
import errno
from collections.abc import Callable
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING
from unittest.mock import patch

from flanneld_py.addresses import IPNetwork
from flanneld_py.core.ownership import link_alias, nexthop_ids, route_mark
from flanneld_py.core.plan import plan
from flanneld_py.daemon.execute import Executor
from flanneld_py.drivers import blackholes, hostroutes, kernel, links, rtnetlink
from flanneld_py.drivers import rtmessages as rt
from flanneld_py.drivers.monitor import Heard, Monitor
from flanneld_py.drivers.netlink import NLA_F_NESTED, U32, attribute, attributes
from flanneld_py.errors import KernelError
from flanneld_py.model import NextHop, Route, Scope, State, VxlanLink
from tests.fuzz.kernel import DONE, ERROR, LIES, MESSAGE, TORN, FuzzedSocket, Message, Wire, pack, unpack
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "/coreos.com/network"
KINDS = (16, 20, 24, 28, 104, 17, 21, 25, 29, 105, ERROR, DONE)
"""RTM_NEW… of links, addresses, routes, neighbours and nexthops, then RTM_DEL…"""
LINK, ADDRESS, ROUTE, NEIGHBOUR, NEXTHOP = range(5)
REFUSED = KINDS.index(ERROR)
NETWORKS = (IPv4Network("10.5.0.0/16"), IPv6Network("fd00:5::/48"))
PEER, PEER6 = IPv4Network("10.5.2.0/24"), IPv6Network("fd00:5:0:2::/64")
INDEX = 7
DEV = "flannel.1"
WANTED = State(
    links={
        DEV: VxlanLink(1, 8472, "lo", IPv4Address("192.0.2.1"), 1450, "02:00:00:00:00:01", link_alias(PREFIX))
    },
    fdb={(DEV, "02:00:00:00:00:02"): IPv4Address("192.0.2.2")},
    neighs={(DEV, PEER[0]): "02:00:00:00:00:02"},
    nexthops={NextHop(DEV, PEER[0], onlink=True): True},
    routes={
        PEER: Route(NextHop(DEV, PEER[0], onlink=True)),
        PEER6: Route(NextHop(DEV, PEER6[0], onlink=True)),
    },
    blackholes={IPv4Network("10.5.1.0/24"): True},
)
SCOPE = Scope(PREFIX, NETWORKS, {PEER: frozenset({PEER[0]}), PEER6: frozenset({PEER6[0]})})


def check(data: bytes) -> None:
    read = READERS[data[0] % len(READERS)] if data else _monitor
    try:
        read(list(unpack(data)))
    except KernelError as error:
        assert read is not _monitor
        one_line(str(error)[:300])


def _host_facts(messages: list[Message]) -> None:
    netlink = FuzzedSocket(Wire(messages, KINDS))
    devices = links.read_devices(netlink)
    for addresses in links.read_addresses(netlink).values():
        assert all(fact.address.version in (4, 6) for fact in addresses)
    names = {device.index: device.name for device in devices}
    hostroutes.read_main(netlink, 4, names)
    hostroutes.read_main(netlink, 6, names)
    hostroutes.look_up(netlink, IPv4Address("192.0.2.2"))
    hostroutes.look_up(netlink, IPv6Address("2001:db8::2"))


def _links_and_addresses(messages: list[Message]) -> None:
    wire = Wire(messages, KINDS)
    with patch.object(kernel, "NetlinkSocket", lambda: FuzzedSocket(wire)):
        driver = kernel.KernelLinks(PREFIX)
    have = driver.observe(SCOPE)
    for dev, address in have.addrs:
        assert dev in have.links
        assert any(address.ip in net for net in NETWORKS), f"foreign: {address}"


def _tables(messages: list[Message]) -> None:
    wire = Wire(messages, KINDS)
    with patch.object(rtnetlink, "NetlinkSocket", lambda: FuzzedSocket(wire)):
        tables = rtnetlink.RtnetlinkTables(PREFIX)
    have = tables.observe(SCOPE)
    assert all(_is_inside(subnet) for subnet in have.routes), f"foreign routes: {have.routes}"
    assert all(any(ip in net for net in NETWORKS) for _, ip in have.neighs), f"foreign: {have.neighs}"
    assert have.fdb.keys() | have.neighs.keys() == set() or any(m.kind % len(KINDS) == LINK for m in messages)
    with patch.object(tables, "_index", lambda _: INDEX):
        ops = [op for op in plan(WANTED, have) if op.table in tables.tables]
        before = len(wire.sent)
        for outcome in Executor([tables]).apply(ops, WANTED, have):
            if outcome.error is not None:
                one_line(outcome.error[:300])
    for request in wire.sent[before:]:
        _assert_ours(request)


def _blackholes(messages: list[Message]) -> None:
    wire = Wire(messages, KINDS)
    with patch.object(blackholes, "NetlinkSocket", lambda: FuzzedSocket(wire)):
        driver = blackholes.Blackholes(PREFIX)
    have = driver.observe(SCOPE)
    assert all(_is_inside(subnet) for subnet in have.blackholes), f"foreign: {have.blackholes}"
    driver.apply([op for op in plan(WANTED, have) if op.table == "blackholes"])
    for request in wire.sent:
        _assert_ours(request)


def _is_inside(subnet: IPNetwork) -> bool:
    same = (net for net in NETWORKS if net.version == subnet.version)
    return any(subnet.network_address in net and subnet.prefixlen >= net.prefixlen for net in same)


def _assert_ours(request: bytes) -> None:
    """What is written or deleted lies inside our Networks, or has one of our numbers."""
    start = 0
    while start < len(request):
        length, kind, _, _, _ = MESSAGE.unpack_from(request, start)
        body, end = start + 16, start + length
        if kind in (rt.RTM_NEWROUTE, rt.RTM_DELROUTE):
            size = rt.RTMSG.unpack_from(request, body)[1]
            base = attributes(request, body + rt.RTMSG.size, end)[rt.RTA_DST]
            assert _is_inside(rt.network(base, size)), "a route outside our Networks is written"
        elif kind in (rt.RTM_NEWNEXTHOP, rt.RTM_DELNEXTHOP):
            (number,) = U32.unpack(attributes(request, body + rt.NHMSG.size, end)[rt.NHA_ID])
            assert number in nexthop_ids(PREFIX), "a nexthop object that is not ours is written"
        elif kind in (rt.RTM_NEWNEIGH, rt.RTM_DELNEIGH):
            assert rt.NDMSG.unpack_from(request, body)[1] == INDEX, "a row on a device that is not ours"
        start += length + 3 & ~3


def _monitor(messages: list[Message]) -> None:
    monitor = _listener()
    wire = Wire(messages, KINDS)
    wire.tell()
    with patch.object(monitor, "_socket", wire):
        heard = monitor._drain()
    assert heard is None or isinstance(heard, Heard)


@cache
def _listener() -> Monitor:
    """Made once: it remembers, as it does in a daemon."""
    monitor = Monitor()
    atexit.register(monitor.close)
    monitor.follow(WANTED, SCOPE)
    monitor.ask([IPv4Address("192.0.2.2"), IPv6Address("2001:db8::2")])
    return monitor


READERS: tuple[Callable[[list[Message]], None], ...] = (
    _host_facts,
    _links_and_addresses,
    _tables,
    _blackholes,
    _monitor,
)


# --- seeds ----------------------------------------------------------------------------------------


def seeds() -> Iterator[bytes]:
    rows = [*_links(), *_addresses(), *_routes(), *_neighbours(), *_nexthops()]
    heaps = [
        rows,
        [Message(row.kind, TORN, row.body) for row in rows],
        [Message(REFUSED, 0, U32.pack((1 << 32) - errno.EEXIST) + bytes(16)), *rows],
        *([row] for row in rows),
        *([row._replace(flags=LIES)] for row in rows),
        *([*rows[:3], Message(row.kind, 0, row.body[:size])] for row in rows for size in (0, 3, 11)),
    ]
    for heap in heaps:
        yield from pack(heap, len(READERS))


def _links() -> Iterator[Message]:
    for name, index, alias in (
        (DEV, INDEX, link_alias(PREFIX)),
        ("other", 9, link_alias("/other")),
        ("lo", 1, ""),
    ):
        info = attribute(1, U32.pack(1)) + attribute(3, U32.pack(1)) + attribute(4, bytes((192, 0, 2, 1)))
        kind = attribute(rt.IFLA_INFO_KIND, b"vxlan\0") + attribute(rt.IFLA_INFO_DATA | NLA_F_NESTED, info)
        yield Message(
            LINK,
            0,
            rt.IFINFOMSG.pack(0, 1, index, 0x11043, 0)
            + attribute(rt.IFLA_IFNAME, name.encode() + b"\0")
            + attribute(rt.IFLA_MTU, U32.pack(1450))
            + attribute(rt.IFLA_ADDRESS, bytes((2, 0, 0, 0, 0, 1)))
            + attribute(rt.IFLA_IFALIAS, alias.encode() + b"\0")
            + attribute(rt.IFLA_LINKINFO | NLA_F_NESTED, kind),
        )


def _addresses() -> Iterator[Message]:
    for family, packed in ((2, bytes((192, 0, 2, 1))), (10, IPv6Address("2001:db8::1").packed)):
        body = rt.IFADDRMSG.pack(family, 24, 0x80, 0, 1) + attribute(1, packed) + attribute(2, packed)
        yield Message(ADDRESS, 0, body + attribute(8, U32.pack(0x80)))


def _routes() -> Iterator[Message]:
    number, mark = nexthop_ids(PREFIX)[0], route_mark(PREFIX)
    made = [
        rt.set_route4(PEER, 96, number, new=True),
        rt.set_route4(PEER, 3, number, new=True),
        rt.set_direct_route4(PEER, 96, 1, new=True),
        rt.set_direct_route6(PEER6, 96, INDEX, mark, new=True),
        rt.set_route6(PEER6, 96, INDEX, PEER6[0], mark, onlink=True, new=True),
        rt.set_blackhole(IPv4Network("10.5.1.0/24"), 96, mark),
        rt.set_blackhole(IPv6Network("fd00:5:0:1::/64"), 96, mark),
        rt.set_direct_route4(IPv4Network("192.0.2.0/24"), 2, 1, new=True),
    ]
    yield from (Message(ROUTE, 0, message[16:]) for message in made)
    hop = rt.RTNEXTHOP.pack(16, 0, 0, 1) + attribute(rt.RTA_GATEWAY, bytes((192, 0, 2, 9)))
    default = rt.RTMSG.pack(2, 0, 0, 0, 254, 3, 0, 1, 0)
    yield Message(ROUTE, 0, default + attribute(rt.RTA_MULTIPATH, hop + hop))
    via = attribute(rt.RTA_VIA, b"\x0a\0" + PEER6[0].packed)
    yield Message(ROUTE, 0, default + attribute(rt.RTA_OIF, U32.pack(1)) + via)


def _neighbours() -> Iterator[Message]:
    made: list[Callable[[], bytes]] = [
        lambda: rt.set_neighbours([(INDEX, PEER[0], "02:00:00:00:00:02")])[0],
        lambda: rt.set_neighbours([(INDEX, PEER6[0], "02:00:00:00:00:02")])[0],
        lambda: rt.set_fdb([(INDEX, IPv4Address("192.0.2.2"), "02:00:00:00:00:02")])[0],
        lambda: rt.set_fdb([(INDEX, IPv6Address("2001:db8::2"), "02:00:00:00:00:03")])[0],
    ]
    yield from (Message(NEIGHBOUR, 0, make()[16:]) for make in made)
    odd = rt.set_fdb([(INDEX, IPv4Address("192.0.2.4"), "02:00:00:00:00:04")])[0][16:]
    yield Message(NEIGHBOUR, 0, odd + attribute(rt.NDA_PORT, b"\x12\xb5"))


def _nexthops() -> Iterator[Message]:
    number = nexthop_ids(PREFIX)[0]
    made = [
        rt.set_nexthop(number, 2, INDEX, PEER[0], onlink=True, new=True),
        rt.set_nexthop(number + 1, 2, INDEX, PEER6[0], onlink=True, new=True),
        rt.set_nexthop(5, 3, 1, IPv4Address("192.0.2.9"), onlink=False, new=True),
    ]
    yield from (Message(NEXTHOP, 0, message[16:]) for message in made)


TARGET = Target(check, seeds, words=(DEV, link_alias(PREFIX), "vxlan", "tun"))
