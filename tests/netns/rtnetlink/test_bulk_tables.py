"""The bulk tables against a real kernel; what stands there is read with `ip` and `bridge`."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from typing import TYPE_CHECKING

import pytest

from flanneld_py.core.ownership import nexthop_ids
from flanneld_py.daemon import garbage
from flanneld_py.drivers.monitor import Monitor
from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from flanneld_py.model import NextHop, Op, Route, Scope, State
from tests.netns.inside import Namespace
from tests.netns.rtnetlink.rows import (
    ADOPTING,
    DEV,
    DEV6,
    NOWHERE,
    PREFIX,
    SCOPE,
    carry_out,
    deletes,
    errors,
    peers,
    sets,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.addresses import IPNetwork
    from flanneld_py.model import Table


def test_rows_come_and_go(net: Namespace, tables: RtnetlinkTables) -> None:
    rows = peers(3, 4, 250)
    carry_out(tables, sets(rows))
    assert shown(net) == rows
    assert tables.observe(SCOPE) == rows
    carry_out(tables, sets(rows))
    assert shown(net) == rows
    carry_out(tables, deletes(peers(3, 4)))
    assert shown(net) == peers(250)
    carry_out(tables, deletes(rows))
    assert shown(net) == State()
    assert tables.observe(SCOPE) == State()


def test_routes_shown_by_nothing_but_their_nexthop_id(net: Namespace, tables: RtnetlinkTables) -> None:
    rows = peers(3, 4)
    carry_out(tables, sets(rows))
    net.run("sysctl", "-qw", "net.ipv4.nexthop_compat_mode=0")
    assert all("gateway" not in row for row in net.show("-4", "route", "show", "root", "10.5.0.0/16"))
    assert tables.observe(SCOPE) == rows


def test_a_new_mac_and_address_replace_the_old(net: Namespace, tables: RtnetlinkTables) -> None:
    carry_out(tables, sets(peers(3)))
    base, mac = ip_address("10.5.3.0"), "02:00:00:00:04:03"
    carry_out(tables, [[Op("set", "fdb", (DEV, mac), ip_address("192.0.2.77"))]])
    carry_out(tables, [[Op("set", "neighs", (DEV, base), "02:00:00:00:00:77")]])
    now = shown(net)
    assert now.fdb[DEV, mac] == ip_address("192.0.2.77")
    assert now.neighs[DEV, base] == "02:00:00:00:00:77"


def test_routes_without_overlay_device(net: Namespace, tables: RtnetlinkTables) -> None:
    """As host-gw makes them: the gateway is a neighbour on the underlay."""
    v4 = Route(NextHop("u0", ip_address("192.0.2.9"), onlink=False))
    v6 = Route(NextHop("u0", ip_address("fd99::9"), onlink=False))
    routes: dict[IPNetwork, Route] = {ip_network("10.5.9.0/24"): v4, ip_network("fd00:5:9::/64"): v6}
    rows = State(nexthops={v4.nexthop: True}, routes=routes)
    carry_out(tables, sets(rows))
    assert shown(net) == rows
    assert tables.observe(SCOPE) == rows


# --- errors ---------------------------------------------------------------------------------------


def test_an_unknown_device_is_an_error_to_set_and_none_to_delete(tables: RtnetlinkTables) -> None:
    hop = NextHop("gone0", ip_address("10.5.3.0"), onlink=True)
    ops: list[tuple[Table, object, object]] = [
        ("fdb", ("gone0", "02:00:00:00:00:01"), ip_address("192.0.2.3")),
        ("neighs", ("gone0", ip_address("10.5.3.0")), "02:00:00:00:00:01"),
        ("nexthops", hop, True),
        ("routes", ip_network("fd00:5:3::/64"), Route(hop._replace(via=ip_address("fd00:5:3::")))),
    ]
    for table, key, value in ops:
        assert errors(tables.apply([Op("set", table, key, value)])) == ["device gone0 does not exist"]
        assert errors(tables.apply([Op("del", table, key)])) == []


def not_on_link(via: object, reason: str = "Nexthop has invalid gateway (ENETUNREACH)") -> str:
    return (
        f"next hop {via} is not on-link, as no network of u0 contains it ({reason}): "
        "connect both hosts to one layer 2 segment, or set Backend.Type to vxlan"
    )


def test_what_the_kernel_refuses_and_the_rest_of_the_batch(net: Namespace, tables: RtnetlinkTables) -> None:
    bad = NextHop("u0", ip_address("203.0.113.9"), onlink=False)
    good = [NextHop(DEV, ip_address(f"10.5.{n}.0"), onlink=True) for n in range(1, 4)]
    outcomes = tables.apply([Op("set", "nexthops", hop, True) for hop in (good[0], bad, *good[1:], bad)])
    said = not_on_link(bad.via)
    assert [outcome.error for outcome in outcomes] == [None, said, None, None, said]
    assert shown(net).nexthops == dict.fromkeys(good, True)
    outcomes = tables.apply(
        [Op("set", "routes", ip_network(f"10.5.{n}.0/24"), Route(hop)) for n, hop in ((1, good[0]), (9, bad))]
    )
    assert errors(outcomes) == ["nexthop 203.0.113.9 on device u0 does not exist"]
    assert list(shown(net).routes) == [ip_network("10.5.1.0/24")]


def test_many_errors_in_one_batch_are_all_told(tables: RtnetlinkTables) -> None:
    hops = [NextHop("u0", IPv4Address(0xCB007100 + n), onlink=False) for n in range(3000)]
    outcomes = tables.apply([Op("set", "nexthops", hop, True) for hop in hops])
    assert [outcome.error for outcome in outcomes] == [not_on_link(hop.via) for hop in hops]


def test_an_ipv6_gateway_that_is_not_on_link(tables: RtnetlinkTables) -> None:
    hop = NextHop("u0", ip_address("2001:db8:77::9"), onlink=False)
    outcomes = tables.apply([Op("set", "routes", ip_network("fd00:5:3::/64"), Route(hop))])
    assert errors(outcomes) == [not_on_link(hop.via, "No route to host (EHOSTUNREACH)")]


def test_a_bad_mac_is_an_error_of_its_row(net: Namespace, tables: RtnetlinkTables) -> None:
    ops = [Op("set", "neighs", (DEV, ip_address(f"10.5.{n}.0")), "02:00") for n in (1, 2)]
    ops[1] = ops[1]._replace(value="02:00:00:00:00:01")
    (error,) = errors(tables.apply(ops))
    assert "'02:00' is not a MAC address" in error
    assert list(shown(net).neighs) == [(DEV, ip_address("10.5.2.0"))]


@pytest.mark.parametrize("refused_by", ["us", "kernel"])
def test_rows_of_several_tables_at_once(net: Namespace, tables: RtnetlinkTables, refused_by: str) -> None:
    """Each outcome is that of its own row, wherever among the tables those are that fail."""
    rows = peers(3, 4)
    bad = {
        "us": [Op("set", "neighs", (DEV, ip_address("10.5.9.0")), "02:00")],
        "kernel": [Op("set", "nexthops", NextHop("u0", ip_address("203.0.113.9"), onlink=False), True)],
    }[refused_by]
    fdb, neighs, nexthops = sets(rows, "fdb", "neighs", "nexthops")
    ops = [*fdb, *neighs, *bad, *nexthops] if refused_by == "us" else [*fdb, *neighs, *bad, *nexthops[:1]]
    outcomes = tables.apply(ops)
    assert [outcome.op for outcome in outcomes] == ops
    assert [outcome.op for outcome in outcomes if outcome.error is not None] == bad
    carry_out(tables, sets(rows, "nexthops", "routes"))
    assert shown(net) == rows
    assert tables.observe(SCOPE) == rows


def test_without_the_capability(net: Namespace) -> None:
    powerless = net.agent("setpriv", "--bounding-set=-net_admin").make(RtnetlinkTables, PREFIX)
    for batch in sets(peers(3), "fdb", "neighs", "nexthops"):
        for error in errors(powerless.apply(batch)):
            assert error == "not permitted, needs CAP_NET_ADMIN (EPERM)"
    assert shown(net) == State()
    assert powerless.observe(SCOPE) == State()


# --- what is ours ---------------------------------------------------------------------------------


def test_what_is_not_ours_is_not_seen(net: Namespace, tables: RtnetlinkTables) -> None:
    mac = "lladdr 02:00:00:00:00:01"
    net.ip(
        "link add other type vxlan id 7 dstport 8472 dev u0",
        "link set other alias flanneld-py:/another/prefix up",
        f"neigh add 10.5.3.0 dev other {mac} nud permanent",
        f"neigh add 10.5.3.0 dev u0 {mac} nud permanent",
        f"neigh add 10.5.3.0 dev {DEV} {mac} nud stale",
        f"neigh add 10.6.3.0 dev {DEV} {mac} nud permanent",
        f"neigh add fe80::9 dev {DEV} {mac} nud permanent",
        "route add 10.6.3.0/24 via 192.0.2.9 proto 96",
        "route add 10.0.0.0/8 via 192.0.2.9 proto 96",
        "route add 10.5.3.0/24 via 192.0.2.9 proto 96 table 7",
        "route add 10.5.4.0/24 via 192.0.2.9 proto static",
        "route add 10.5.5.0/24 via 192.0.2.9",
        "route add fd00:5:4::/64 via fd99::9",
        "nexthop add id 7 via 192.0.2.9 dev u0 proto kernel",
        f"nexthop add id {nexthop_ids('/another/prefix')[5]} via 192.0.2.9 dev u0 proto kernel",
        f"nexthop add id {nexthop_ids(PREFIX)[5]} via 192.0.2.9 dev u0 proto static",
    )
    for line in ("other dst 192.0.2.3", f"{DEV} dst 239.1.1.1", f"{DEV} dst 192.0.2.3 dynamic"):
        net.run("bridge", "fdb", "append", "02:00:00:00:00:03", "self", "dev", *line.split())
    net.run("bridge", "fdb", "append", "01:00:5e:00:00:01", "self", "dev", DEV, "dst", "192.0.2.3")
    seen = tables.observe(SCOPE)
    assert (seen.neighs, seen.nexthops, seen.routes) == ({}, {}, {})
    assert seen.fdb == {}


def test_foreign_nexthop_ids_in_our_range_are_left_alone(net: Namespace, tables: RtnetlinkTables) -> None:
    ids = nexthop_ids(PREFIX)
    net.ip(*(f"nexthop add id {ids[n]} via 192.0.2.9 dev u0 proto static" for n in (0, 1, 3)))
    tables.observe(SCOPE)
    rows = peers(3, 4, 5)
    carry_out(tables, sets(rows))
    assert tables.observe(SCOPE) == rows
    shown_ids = {row["id"]: row["protocol"] for row in net.show("nexthop")}
    assert {number for number, protocol in shown_ids.items() if protocol == "static"} == {
        ids[0],
        ids[1],
        ids[3],
    }
    assert all(number in ids for number in shown_ids)
    carry_out(tables, deletes(rows))
    assert len(net.show("nexthop")) == 3


def test_a_taken_id_costs_one_attempt(net: Namespace, tables: RtnetlinkTables) -> None:
    """Somebody may take the next free id between our look and our write."""
    net.ip(f"nexthop add id {nexthop_ids(PREFIX)[0]} via 192.0.2.9 dev u0 proto static")
    (batch,) = sets(peers(3), "nexthops")
    assert len(errors(tables.apply(batch))) == 1
    assert errors(tables.apply(batch)) == []
    assert len(net.show("nexthop")) == 2


def test_all_ids_of_a_nexthop_are_deleted(net: Namespace, tables: RtnetlinkTables) -> None:
    ids = nexthop_ids(PREFIX)
    for number in (ids[7], ids[9]):
        net.ip(f"nexthop add id {number} via 10.5.3.0 dev {DEV} onlink proto kernel")
    net.ip(
        f"nexthop add id {ids[11]} blackhole proto kernel", f"route add 10.5.9.0/24 nhid {ids[11]} proto 96"
    )
    seen = tables.observe(SCOPE)
    odd = NextHop("", NOWHERE[4], onlink=False)
    assert seen.nexthops == {NextHop(DEV, ip_address("10.5.3.0"), onlink=True): True, odd: True}
    carry_out(tables, [[Op("del", "nexthops", hop) for hop in seen.nexthops]])
    assert net.show("nexthop") == []


def test_nexthops_flushed_with_their_device_are_made_again(net: Namespace, tables: RtnetlinkTables) -> None:
    rows = peers(3)
    carry_out(tables, sets(rows))
    net.ip(*(f"link set {dev} {state}" for dev in (DEV, DEV6) for state in ("down", "up")))
    seen = tables.observe(SCOPE)
    assert (seen.nexthops, seen.routes, seen.neighs) == ({}, {}, {})
    carry_out(tables, sets(rows))
    assert shown(net) == rows
    net.ip(*(f"link set {dev} {state}" for dev in (DEV, DEV6) for state in ("down", "up")))
    carry_out(tables, sets(rows))  # what was learnt before is stale, and nobody looked
    assert shown(net) == rows


def test_a_route_through_another_daemons_nexthop_is_not_ours(net: Namespace, tables: RtnetlinkTables) -> None:
    """Its Network may be an old one of ours."""
    ident = nexthop_ids("/another/prefix")[5]
    net.ip(
        "link add other type vxlan id 7 dstport 8472 dev u0",
        "link set other alias flanneld-py:/another/prefix up",
        "nexthop add id 7 via 192.0.2.9 dev u0",
        f"nexthop add id {ident} via 192.0.2.9 dev u0 proto kernel",
        f"route add 10.5.3.0/24 nhid {ident} proto 96",
        "route add 10.5.4.0/24 nhid 7 proto 96",
        "route add fd00:5:3::/64 via fd00:5:3:: dev other onlink proto 96",
    )
    seen = tables.observe(SCOPE)
    assert (seen.nexthops, seen.routes) == ({}, {})


def test_a_nexthop_of_another_prefix_that_shares_our_ids_is_not_ours(
    net: Namespace, tables: RtnetlinkTables
) -> None:
    """Of 16,384 prefixes two share a range."""
    ids = nexthop_ids(PREFIX)
    net.ip(
        "link add other type vxlan id 7 dstport 8472 dev u0",
        "link set other alias flanneld-py:/another/prefix up",
        f"nexthop add id {ids[0]} via 10.9.3.0 dev other onlink proto kernel",
        f"nexthop add id {ids[1]} via 192.0.2.3 dev u0 proto kernel",
        f"route add 10.9.4.0/24 nhid {ids[1]} proto 96",
    )
    theirs = net.show("nexthop")
    assert tables.observe(ADOPTING).nexthops == {}
    rows = peers(3, 4)
    carry_out(tables, sets(rows))
    assert tables.observe(ADOPTING) == rows
    carry_out(tables, deletes(rows))
    assert net.show("nexthop") == theirs


@pytest.mark.parametrize(
    "line",
    [f"via 10.5.3.0 dev {DEV} onlink", "via 192.0.2.99 dev u0", "blackhole"],
    ids=["vxlan", "host-gw", "odd"],
)
def test_a_nexthop_left_by_an_earlier_process_is_ours(
    net: Namespace, tables: RtnetlinkTables, line: str
) -> None:
    net.ip(f"nexthop add id {nexthop_ids(PREFIX)[9]} {line} proto kernel")
    seen = tables.observe(ADOPTING).nexthops
    assert len(seen) == 1
    carry_out(tables, [[Op("del", "nexthops", hop) for hop in seen]])
    assert net.show("nexthop") == []


@pytest.mark.parametrize("change", ["via 192.0.2.99 dev u0", "blackhole"])
def test_a_nexthop_of_ours_that_another_changed_is_repaired(
    net: Namespace, tables: RtnetlinkTables, change: str
) -> None:
    """Whoever replaces one of ours takes its protocol off as well."""
    rows = peers(3)
    carry_out(tables, sets(rows))
    assert tables.observe(SCOPE) == rows
    net.ip(f"nexthop replace id {nexthop_ids(PREFIX)[0]} {change}")
    seen = tables.observe(SCOPE)
    (odd,) = seen.nexthops
    assert odd not in rows.nexthops
    carry_out(tables, [*sets(rows, "nexthops", "routes"), [Op("del", "nexthops", odd)]])
    assert shown(net) == rows


# --- many -----------------------------------------------------------------------------------------


def test_ten_thousand_peers(net: Namespace, record_property: Callable[[str, object], None]) -> None:
    agent = net.agent()
    agent.call(garbage.begin)  # as the daemon does
    tables, deaf = agent.make(RtnetlinkTables, PREFIX), agent.make(Monitor)
    overlay = IPv4Network("10.0.0.0/10")
    subnets = [IPv4Network((int(overlay[0]) + 256 * n, 24)) for n in range(1, 10_001)]
    macs = [f"02:00:00:{n >> 16:02x}:{n >> 8 & 255:02x}:{n & 255:02x}" for n in range(10_000)]
    hops = [NextHop(DEV, subnet.network_address, onlink=True) for subnet in subnets]
    rows = State(
        fdb={(DEV, mac): ip_address(0xAC100000 + n) for n, mac in enumerate(macs)},
        neighs={(DEV, subnet[0]): mac for subnet, mac in zip(subnets, macs, strict=True)},
        nexthops=dict.fromkeys(hops, True),
        routes={subnet: Route(hop) for subnet, hop in zip(subnets, hops, strict=True)},
    )
    scope = Scope(PREFIX, (overlay,))
    writing = 0.0
    for batch in sets(rows):
        assert errors(tables.apply(batch)) == []
        writing += agent.user_seconds
    assert tables.observe(scope) == rows
    reading = agent.user_seconds
    record_property("user CPU s to write and to read 40,000 rows", (writing, reading))
    # A library would need 8 s and 1.5 s; a slow machine may need a few times what was measured (0.1, 0.1).
    assert writing < 0.8
    assert reading < 0.8
    assert len(net.run("ip", "route", "show", "root", "10.0.0.0/10").splitlines()) == 10_000
    assert len(net.run("ip", "nexthop").splitlines()) == 10_000
    assert len(net.run("ip", "neigh", "show", "dev", DEV).splitlines()) == 10_000
    for batch in deletes(rows):
        assert errors(tables.apply(batch)) == []
    assert tables.observe(scope) == State()
    heard = deaf.wait(5)
    assert heard is not None
    assert heard.overflow
