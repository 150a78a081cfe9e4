"""Rows of ours that somebody changed, and routes that move to another device."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from flanneld_py.model import NextHop, Op, Route, State
from tests.netns.inside import Namespace
from tests.netns.rtnetlink.rows import DEV, NOWHERE, SCOPE, carry_out, peers, sets, shown, shown_routes


@pytest.mark.parametrize("there", ["alone", "beside"])
@pytest.mark.parametrize(
    "line",
    [
        "blackhole 10.5.3.0/24 {}",
        "unreachable 10.5.3.0/24 {}",
        "10.5.3.0/24 {} dev u0",
        "10.5.3.0/24 {} nexthop via 192.0.2.9 dev u0 nexthop via 192.0.2.10 dev u0",
        "10.5.3.0/24 {} metric 50 via 192.0.2.9",
        "10.5.3.0/24 {} tos 4 via 192.0.2.9",
        "10.5.3.0/24 {} via inet6 fd99::9 dev u0",
        "blackhole fd00:5:3::/64 {}",
        "fd00:5:3::/64 {} dev u0",
        "fd00:5:3::/64 {} nexthop via fd99::9 dev u0 nexthop via fd99::10 dev u0",
        "fd00:5:3::/64 {} nhid 6",
        "fd00:5:3::/64 {} metric 50 via fd99::9 dev u0",
        "fd00:5:3::/64 {} metric 5000 via fd99::9 dev u0",
    ],
)
def test_a_strange_route_of_ours_is_seen_and_repaired(
    net: Namespace, tables: RtnetlinkTables, line: str, there: str
) -> None:
    rows = peers(3)
    version = 6 if "fd00" in line else 4
    (destination,) = (subnet for subnet in rows.routes if subnet.version == version)
    set_it, delete_it = (
        Op("set", "routes", destination, rows.routes[destination]),
        Op("del", "routes", destination),
    )
    net.ip("nexthop add id 5 via 192.0.2.9 dev u0", "nexthop add id 6 via fd99::9 dev u0")
    carry_out(tables, sets(rows, "nexthops"))
    for repair, gateways in ((set_it, [str(destination.network_address)]), (delete_it, [])):
        carry_out(tables, [[set_it if there == "beside" else delete_it]])
        net.ip(f"route append {line.format('proto 96')}")
        seen = tables.observe(SCOPE).routes[destination]
        # Alone and without a gateway it is what another backend wants, and none of these rows.
        is_direct = line.endswith("{} dev u0") and there == "alone"
        odd = NextHop("u0", None, onlink=False) if is_direct else NextHop("", NOWHERE[version], onlink=False)
        assert seen == Route(odd)
        carry_out(tables, [[repair]])
        left = [row for row in shown_routes(net) if ip_network(row["dst"]) == destination]
        assert [row.get("gateway") for row in left] == gateways


@pytest.mark.parametrize("repair", ["set", "del"])
@pytest.mark.parametrize("change", ["dst 192.0.2.3 port 999", "dst 192.0.2.3 via u0", "nhid 51"])
def test_a_strange_fdb_entry_is_seen_and_repaired(
    net: Namespace, tables: RtnetlinkTables, change: str, repair: str
) -> None:
    mac = "02:00:00:00:04:03"
    rows = peers(3)
    net.ip("nexthop add id 50 via 192.0.2.9 fdb", "nexthop add id 51 group 50 fdb")
    net.run("bridge", "fdb", "add", mac, "dev", DEV, "self", "permanent", *change.split())
    assert tables.observe(SCOPE).fdb[DEV, mac] == NOWHERE[4]
    wanted = rows.fdb[DEV, mac]
    op = Op("set", "fdb", (DEV, mac), wanted) if repair == "set" else Op("del", "fdb", (DEV, mac))
    carry_out(tables, [[op]])
    left = [row for row in net.show("bridge", "fdb", "show", "dev", DEV) if row["mac"] == mac]
    assert [{"dst", "port", "viaIf", "nhid"} & row.keys() for row in left] == [{"dst"}] * (repair == "set")
    assert tables.observe(SCOPE).fdb == ({(DEV, mac): wanted} if repair == "set" else {})


def test_what_stood_in_the_way_may_be_gone_meanwhile(net: Namespace, tables: RtnetlinkTables) -> None:
    rows = peers(3)
    net.ip("route add 10.5.3.0/24 proto 96 metric 50 via 192.0.2.9")
    tables.observe(SCOPE)
    net.ip("route del 10.5.3.0/24")
    carry_out(tables, sets(rows))
    assert shown(net) == rows


@pytest.mark.parametrize("look", [True, False], ids=["after a look", "at once"])
@pytest.mark.parametrize("direction", ["into the overlay", "out of it"])
def test_routes_move_to_another_device(
    net: Namespace, tables: RtnetlinkTables, direction: str, look: bool
) -> None:
    overlay, direct = peers(3), State()
    hops = {4: ip_address("192.0.2.3"), 6: ip_address("fd99::3")}
    routes = {subnet: Route(NextHop("u0", hops[subnet.version], onlink=False)) for subnet in overlay.routes}
    direct = State(nexthops={routes[ip_network("10.5.3.0/24")].nexthop: True}, routes=routes)
    before, then = (direct, overlay) if direction == "into the overlay" else (overlay, direct)
    carry_out(tables, sets(before))
    if look:
        tables.observe(SCOPE)
    carry_out(tables, sets(then))
    assert shown(net).routes == then.routes
