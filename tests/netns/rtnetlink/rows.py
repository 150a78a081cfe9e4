"""Rows for peers, and the tables as `ip` and `bridge` show them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from flanneld_py.addresses import IPAddress
from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from flanneld_py.model import NextHop, Op, Route, Scope, State
from tests.netns.inside import Namespace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanneld_py.addresses import IPNetwork
    from flanneld_py.model import Outcome, Table

PREFIX = "/coreos.com/network"
NETWORKS = (ip_network("10.5.0.0/16"), ip_network("fd00:5::/32"))
SCOPE = Scope(PREFIX, NETWORKS)
DEV, DEV6 = "flannel.1", "flannel-v6.1"
ADOPTABLE: dict[IPNetwork, frozenset[IPAddress]] = {
    IPv4Network("10.5.3.0/24"): frozenset({ip_address("10.5.3.0"), ip_address("192.0.2.3")}),
    IPv6Network("fd00:5:3::/64"): frozenset({ip_address("fd00:5:3::")}),
}
ADOPTING = Scope(PREFIX, NETWORKS, adoptable=ADOPTABLE)
ORDER: tuple[Table, ...] = ("fdb", "neighs", "nexthops", "routes")
NOWHERE: dict[int, IPAddress] = {4: IPv4Address(0), 6: IPv6Address(0)}


def peers(*numbers: int) -> State:
    """Rows for peers: 10.5.<n>.0/24 and fd00:5:<n>::/64, reached at 192.0.2.<n> and fd99::<n>."""
    fdb: dict[tuple[str, str], IPAddress] = {}
    neighs: dict[tuple[str, IPAddress], str] = {}
    routes: dict[IPNetwork, Route] = {}
    for n in numbers:
        for dev, subnet, underlay, mac in (
            (DEV, ip_network(f"10.5.{n}.0/24"), f"192.0.2.{n}", f"02:00:00:00:04:{n:02x}"),
            (DEV6, ip_network(f"fd00:5:{n:x}::/64"), f"fd99::{n:x}", f"02:00:00:00:06:{n:02x}"),
        ):
            base = subnet.network_address
            fdb[dev, mac] = ip_address(underlay)
            neighs[dev, base] = mac
            routes[subnet] = Route(NextHop(dev, base, onlink=True))
    nexthops = {route.nexthop: True for subnet, route in routes.items() if subnet.version == 4}
    return State(fdb=fdb, neighs=neighs, nexthops=nexthops, routes=routes)


def sets(state: State, *only: Table) -> list[list[Op]]:
    return [[Op("set", table, k, v) for k, v in state.table(table).items()] for table in only or ORDER]


def deletes(state: State) -> list[list[Op]]:
    return [[Op("del", table, key) for key in state.table(table)] for table in reversed(ORDER)]


def carry_out(tables: RtnetlinkTables, batches: Sequence[Sequence[Op]]) -> None:
    for batch in batches:
        assert errors(tables.apply(batch)) == []


def errors(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.error for outcome in outcomes if outcome.error]


def shown_routes(net: Namespace, *what: str) -> list[dict[str, Any]]:
    wanted = what or ("root", "10.5.0.0/16"), what or ("root", "fd00:5::/32")
    return [*net.show("-4", "route", "show", *wanted[0]), *net.show("-6", "route", "show", *wanted[1])]


def shown(net: Namespace) -> State:
    """The tables as iproute2 shows them, every route's gateway followed through its nexthop object."""
    fdb, neighs, routes = {}, {}, {}
    for dev in (DEV, DEV6):
        for row in net.show("bridge", "fdb", "show", "dev", dev):
            assert (row["state"], row["flags"]) == ("permanent", ["self"])
            fdb[dev, row["mac"]] = ip_address(row["dst"])
        for row in net.show("neigh", "show", "dev", dev, "nud", "permanent"):
            neighs[dev, ip_address(row["dst"])] = row["lladdr"]
    hops = {
        row["id"]: NextHop(row["dev"], ip_address(row["gateway"]), "onlink" in row["flags"])
        for row in net.show("nexthop")
    }
    for row in shown_routes(net):
        assert row["type"] == "unicast"
        assert row["protocol"] == "96"
        assert row.get("metric") == (1024 if ":" in row["dst"] else None)
        hop = NextHop(row["dev"], ip_address(row["gateway"]), "onlink" in row["flags"])
        assert "nhid" not in row or hops[row["nhid"]] == hop
        assert ("nhid" in row) == (":" not in row["dst"])
        routes[ip_network(row["dst"])] = Route(hop)
    return State(fdb=fdb, neighs=neighs, nexthops=dict.fromkeys(hops.values(), True), routes=routes)
