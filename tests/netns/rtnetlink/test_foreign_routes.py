"""Routes of others, and those that Go flannel left, beside the bulk tables."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from flanneld_py.model import NextHop, Op, Route, State
from tests.netns.inside import Namespace
from tests.netns.rtnetlink.rows import (
    ADOPTABLE,
    ADOPTING,
    DEV,
    DEV6,
    PREFIX,
    SCOPE,
    carry_out,
    errors,
    peers,
    sets,
    shown,
    shown_routes,
)

# --- routes of others -----------------------------------------------------------------------------

FOREIGN = (
    ("10.5.3.0/24", "via 192.0.2.77 dev u0 proto static", ""),
    ("10.5.3.0/24", "via 192.0.2.77 dev u0", "via 192.0.2.77 dev u0 proto boot"),
    ("10.5.3.0/24", "via 192.0.2.77 dev u0 proto bird", ""),
    ("10.5.3.0/24", "via 192.0.2.77 dev u0 proto 77", ""),
    ("10.5.3.0/24", "dev u0 proto kernel scope link", "dev u0 proto kernel"),
    ("10.5.3.0/24", "nhid 5 proto 96", "via 192.0.2.99 dev u0 proto 96"),
    ("fd00:5:3::/64", "via fd99::77 dev u0 proto static", ""),
)


def standing(net: Namespace, destination: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = net.show("-6" if ":" in destination else "-4", "route", "show", destination)
    assert rows
    return rows


@pytest.mark.parametrize(("destination", "line", "text"), FOREIGN)
def test_a_foreign_route_is_never_replaced(
    net: Namespace, tables: RtnetlinkTables, destination: str, line: str, text: str
) -> None:
    net.ip("nexthop add id 5 via 192.0.2.99 dev u0", f"route add {destination} {line}")
    theirs = standing(net, destination)
    rows = peers(3)
    carry_out(tables, sets(rows, "fdb", "neighs", "nexthops"))
    wanted = Op("set", "routes", ip_network(destination), rows.routes[ip_network(destination)])
    for _ in "once", "again":
        assert ip_network(destination) not in tables.observe(ADOPTING).routes
        assert errors(tables.apply([wanted])) == [
            f"a route to {destination} {text or line} is not ours; remove it, or the lease of that subnet "
            f"from etcd"
        ]
        assert standing(net, destination) == theirs
    net.ip(f"route del {destination}")
    carry_out(tables, [[wanted]])
    assert shown(net).routes == {wanted.key: wanted.value}


def test_a_foreign_ipv6_route_is_never_replaced_where_the_kernel_would(
    net: Namespace, tables: RtnetlinkTables
) -> None:
    """As host-gw would: of a gateway inside the destination the kernel refuses another device anyway."""
    destination, line = "fd00:5:3::/64", "via fd99::77 dev u0 proto static"
    net.ip(f"route add {destination} {line}")
    wanted = Route(NextHop("u0", ip_address("fd99::3"), onlink=False))
    (error,) = errors(tables.apply([Op("set", "routes", ip_network(destination), wanted)]))
    assert error.startswith(f"a route to {destination} {line} is not ours")
    assert [row["gateway"] for row in standing(net, destination)] == ["fd99::77"]


@pytest.mark.parametrize("destination", ["10.5.3.0/24", "fd00:5:3::/64"])
def test_a_route_that_was_ours_is_taken_back(
    net: Namespace, tables: RtnetlinkTables, destination: str
) -> None:
    rows, key = peers(3), ip_network(destination)
    via = "fd99::77" if key.version == 6 else "192.0.2.77"
    carry_out(tables, sets(rows))
    heirs = [net.agent().make(RtnetlinkTables, PREFIX) for _ in range(2)]
    assert heirs[0].observe(ADOPTING) == rows
    for knowing in (tables, heirs[0]):
        net.ip(f"route replace {destination} via {via} proto static")
        assert key not in knowing.observe(ADOPTING).routes
        carry_out(knowing, [[Op("set", "routes", key, rows.routes[key])]])
        assert shown(net) == rows

    # One that never saw it as ours, or whose record was gone meanwhile, cannot know.
    net.ip(f"route replace {destination} via {via} proto static")
    for unknowing in (tables, heirs[1]):
        unknowing.observe(SCOPE)
        (error,) = errors(unknowing.apply([Op("set", "routes", key, rows.routes[key])]))
        assert f"a route to {destination} via {via} dev u0 proto static is not ours" in error


@pytest.mark.parametrize("protocol", ["static", "boot"])
@pytest.mark.parametrize("verb", ["prepend", "append"])
def test_a_foreign_route_beside_ours_is_told(
    net: Namespace, tables: RtnetlinkTables, verb: str, protocol: str
) -> None:
    rows, key = peers(3), ip_network("10.5.3.0/24")
    carry_out(tables, sets(rows))
    wanted = Op("set", "routes", key, rows.routes[key])
    line = f"10.5.3.0/24 via 192.0.2.77 dev u0 proto {protocol}"
    net.ip(f"route {verb} {line}")
    assert tables.observe(ADOPTING).routes[key] != wanted.value
    (error,) = errors(tables.apply([wanted]))
    assert error.startswith(f"a route to {line} is not ours")
    assert len(net.show("route", "show", "10.5.3.0/24")) == 2
    net.ip(f"route del {line}")
    assert tables.observe(ADOPTING) == rows
    net.ip(f"route {verb} {line}")
    tables.observe(ADOPTING)
    carry_out(tables, [[Op("del", "routes", key)]])
    assert [row["gateway"] for row in net.show("route", "show", "10.5.3.0/24")] == ["192.0.2.77"]


# --- Go flannel's leftovers -----------------------------------------------------------------------

GO_ROUTES = (f"10.5.3.0/24 via 10.5.3.0 dev {DEV} onlink", f"fd00:5:3::/64 via fd00:5:3:: dev {DEV6} onlink")


def test_go_flannels_routes_are_replaced_in_place(net: Namespace, tables: RtnetlinkTables) -> None:
    net.ip(*(f"route add {line}" for line in GO_ROUTES))
    rows = peers(3)
    seen = tables.observe(ADOPTING)
    assert seen.routes == {subnet: route._replace(protocol=3) for subnet, route in rows.routes.items()}
    carry_out(tables, sets(rows))
    assert shown(net) == rows
    assert tables.observe(ADOPTING) == rows


def test_go_flannels_routes_can_be_deleted(net: Namespace, tables: RtnetlinkTables) -> None:
    net.ip(*(f"route add {line}" for line in GO_ROUTES))
    tables.observe(ADOPTING)
    carry_out(tables, [[Op("del", "routes", subnet) for subnet in ADOPTABLE]])
    assert shown_routes(net) == []


@pytest.mark.parametrize(
    "line",
    [
        "10.5.3.0/24 via 192.0.2.99",
        "10.5.3.0/24 via 192.0.2.3 metric 5",
        "10.5.3.0/24 via 192.0.2.3 proto static",
        "10.5.3.0/25 via 192.0.2.3",
        "10.5.4.0/24 via 192.0.2.3",
        f"10.5.3.0/24 dev {DEV}",
        "blackhole 10.5.3.0/24",
        "fd00:5:3::/64 via fd99::3",
        f"fd00:5:3::/64 via fd00:5:3:: dev {DEV6} onlink metric 5",
    ],
)
def test_routes_that_go_flannel_did_not_make_are_not_adopted(
    net: Namespace, tables: RtnetlinkTables, line: str
) -> None:
    net.ip(f"route add {line}")
    assert tables.observe(ADOPTING) == State()
    carry_out(tables, [[Op("del", "routes", subnet) for subnet in ADOPTABLE]])
    assert len(shown_routes(net)) == 1
