"""What a monitor hears of changes in a real kernel, and what it must not wake for."""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import IPAddress
from flanneld_py.core.ownership import link_alias, nexthop_ids
from flanneld_py.drivers.kernel import KernelLinks
from flanneld_py.drivers.monitor import Heard, Monitor
from flanneld_py.drivers.rtnetlink import RtnetlinkTables
from flanneld_py.lab import wait_for
from flanneld_py.model import NextHop, Op, Route, Scope, State, VxlanLink
from tests.netns.inside import Namespace, Watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.addresses import IPNetwork
    from flanneld_py.model import Table
    from tests.netns.inside import Agent

PREFIX = "/coreos.com/network"
NETWORKS = (ip_network("10.5.0.0/16"), ip_network("fd00:5::/32"))
DEV = "flannel.1"
MAC = "02:00:00:00:00:03"
FDB: dict[tuple[str, str], IPAddress] = {(DEV, MAC): IPv4Address("192.0.2.3")}
SCOPE = Scope(PREFIX, NETWORKS)
ID = nexthop_ids(PREFIX)[77]
LINK = VxlanLink(1, 8472, "u0", ip_address("192.0.2.1"), 1450, "02:00:00:00:00:01", link_alias(PREFIX))
PEER4, PEER6 = (
    NextHop(DEV, ip_address("10.5.3.0"), onlink=True),
    NextHop(DEV, ip_address("fd00:5:3::"), onlink=True),
)
ROUTES: dict[IPNetwork, Route] = {
    ip_network("10.5.3.0/24"): Route(PEER4),
    ip_network("fd00:5:3::/64"): Route(PEER6),
}
WANT = State(
    links={DEV: LINK},
    fdb=FDB,
    neighs={(DEV, ip_address("10.5.3.0")): MAC, (DEV, ip_address("fd00:5:3::")): MAC},
    nexthops={PEER4: True},
    routes=ROUTES,
)


def devices(*names: str) -> State:
    return State(links=dict.fromkeys(names, LINK))


SOON = 5.0
"""Seconds within which what was done before must be heard."""
QUIET = 0.1
"""Seconds to listen when nothing is expected: the kernel notifies while it carries out a change."""


@pytest.fixture
def net() -> Iterator[Namespace]:
    """An underlay u0, the vxlan device of ours, and one peer's rows for both families."""
    with Namespace() as namespace:
        # No link-local addresses, of which the kernel would speak by itself when it has tested them.
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.addr_gen_mode=1")
        namespace.ip(
            "link add u0 type veth peer name u1",
            "link set u1 up",
            "addr add 192.0.2.1/24 dev u0",
            "addr add fd99::1/64 dev u0 nodad",
            "link set u0 up",
            f"link add {DEV} type vxlan id 1 dstport 8472 dev u0 local 192.0.2.1 nolearning",
            f"link set {DEV} alias {link_alias(PREFIX)} up",
            f"addr add 10.5.34.0/32 dev {DEV}",
            f"neigh add 10.5.3.0 dev {DEV} lladdr {MAC} nud permanent",
            f"neigh add fd00:5:3:: dev {DEV} lladdr {MAC} nud permanent",
            f"nexthop add id {ID} via 10.5.3.0 dev {DEV} onlink proto kernel",
            f"route add 10.5.3.0/24 nhid {ID} proto 96",
            f"route add fd00:5:3::/64 via fd00:5:3:: dev {DEV} onlink proto 96",
        )
        namespace.run("bridge", "fdb", "add", MAC, "dev", DEV, "dst", "192.0.2.3", "self", "permanent")
        while {row["operstate"] for row in namespace.show("link", "show", "type", "veth")} != {"UP"}:
            pass  # the kernel tells of the carrier a little later
        yield namespace


@pytest.fixture
def agent(net: Namespace) -> Agent:
    return net.agent()


@pytest.fixture
def monitor(agent: Agent) -> Monitor:
    made = agent.make(Monitor)
    made.follow(WANT, SCOPE)
    return made


@pytest.mark.parametrize(
    "line",
    [
        "neigh del 10.5.3.0 dev flannel.1",
        "neigh replace 10.5.3.0 dev flannel.1 lladdr 02:00:00:00:00:99 nud permanent",
        "neigh replace 10.5.3.0 dev flannel.1 lladdr 02:00:00:00:00:03 nud reachable",
        "neigh del fd00:5:3:: dev flannel.1",
        "neigh flush dev flannel.1 nud permanent",
        "neigh add 10.5.9.0 dev flannel.1 lladdr 02:00:00:00:00:09 nud permanent",
        "route del 10.5.3.0/24",
        "route replace 10.5.3.0/24 via 192.0.2.9",
        "route del fd00:5:3::/64",
        "route replace fd00:5:3::/64 via fd99::9",
        "route add 10.5.9.0/24 via 192.0.2.9 proto 96",
        "-6 route flush proto 96",
        f"nexthop del id {ID}",
        f"nexthop replace id {ID} via 192.0.2.9 dev u0",
        "neigh replace 10.5.3.0 dev flannel.1 nud failed",
        "neigh replace 10.5.3.0 dev flannel.1 nud incomplete",
        "route prepend 10.5.3.0/24 via 192.0.2.9",
        "bridge fdb replace 02:00:00:00:00:03 dev flannel.1 self dynamic dst 192.0.2.3",
        "bridge fdb replace 02:00:00:00:00:03 dev flannel.1 self static dst 192.0.2.9",
        "nexthop flush proto 2",
        "bridge fdb del 02:00:00:00:00:03 dev flannel.1 self",
        "bridge fdb replace 02:00:00:00:00:03 dev flannel.1 self permanent dst 192.0.2.9",
        "bridge fdb replace 02:00:00:00:00:09 dev flannel.1 self permanent dst 192.0.2.9",
    ],
)
def test_a_touched_row_of_ours_is_heard(net: Namespace, monitor: Monitor, line: str) -> None:
    net.run(*line.split()) if line.startswith("bridge") else net.ip(line)
    assert monitor.wait(SOON) == Heard(ours=True)
    assert monitor.wait(0) in (None, Heard(ours=True))  # of a flush, it may hear in two parts


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("link set flannel.1 down", DEV),
        ("link set flannel.1 mtu 1300", DEV),
        ("link set flannel.1 address 02:00:00:00:00:77", DEV),
        ("link set flannel.1 type vxlan learning", DEV),
        ("link set flannel.1 alias other", DEV),
        ("link del flannel.1", DEV),
        ("addr del 10.5.34.0/32 dev flannel.1", DEV),
        ("link set u0 down", "u0"),
        ("link set u0 mtu 9000", "u0"),
        ("link set u1 down", "u0"),
        ("addr add 192.0.2.99/24 dev u0", "u0"),
        ("addr del fd99::1/64 dev u0", "u0"),
        ("link add v0 type veth peer name v1", "v0"),
    ],
)
def test_a_changed_link_or_address_is_heard(net: Namespace, monitor: Monitor, line: str, name: str) -> None:
    net.ip(line)
    names: set[str] = set()
    while name not in names:  # one end of a veth may be heard before the other
        heard = monitor.wait(SOON)
        assert heard is not None, names
        assert heard.host
        assert not heard.overflow
        names |= heard.links


@pytest.mark.parametrize("line", ["default via 192.0.2.9", "default via fd99::9"])
def test_a_default_route_is_heard_as_a_fact_of_the_host(net: Namespace, monitor: Monitor, line: str) -> None:
    for verb in ("add", "del"):
        net.ip(f"route {verb} {line}")
        assert monitor.wait(SOON) == Heard(host=True)


def test_what_others_do_elsewhere_wakes_nobody(net: Namespace, monitor: Monitor) -> None:
    net.ip(
        "neigh add 192.0.2.50 dev u0 lladdr 02:00:00:00:00:50 nud permanent",
        "neigh add 192.0.2.51 dev u0 lladdr 02:00:00:00:00:51 nud stale",
        "neigh del 192.0.2.50 dev u0",
        "neigh flush dev u0",
        "route add 10.9.0.0/16 via 192.0.2.9",
        "route replace 10.9.0.0/16 via 192.0.2.10",
        "route add 10.5.77.0/24 via 192.0.2.9",
        "route add 10.9.1.0/24 via 192.0.2.9 proto 96",
        "route add default via 192.0.2.9 table 7",
        "route add fd77::/64 via fd99::9",
        "nexthop add id 7 via 192.0.2.9 dev u0",
        "nexthop del id 7",
    )
    net.run("bridge", "fdb", "add", "02:00:00:00:00:50", "dev", "u0", "self")
    assert monitor.wait(QUIET) is None


def test_the_kernel_resolving_addresses_wakes_nobody(net: Namespace, monitor: Monitor) -> None:
    net.ip(
        f"neigh add 10.5.7.0 dev {DEV} nud incomplete",
        f"neigh replace 10.5.7.0 dev {DEV} nud failed",
    )
    net.run("bridge", "fdb", "add", "02:00:00:00:00:07", "dev", DEV, "dst", "192.0.2.7", "self", "dynamic")
    assert monitor.wait(QUIET) is None


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe"])
def test_a_device_whose_name_is_no_utf8_is_heard(net: Namespace, monitor: Monitor, name: bytes) -> None:
    net.run(*(os.fsdecode(word) for word in (b"ip", b"link", b"add", name, b"type", b"bridge")))
    net.run("ip", "address", "add", "10.9.9.9/32", "dev", os.fsdecode(name))
    heard = monitor.wait(SOON)
    assert heard is not None
    assert name.decode(errors="backslashreplace") in heard.links
    for link in heard.links:
        link.encode()


def test_own_writes_wake_nobody(agent: Agent) -> None:
    tables, links = agent.make(RtnetlinkTables, PREFIX), agent.make(KernelLinks, PREFIX)
    monitor = agent.make(Monitor, {*tables.port_ids, *links.port_ids})
    mac, base, base6 = "02:00:00:00:00:08", ip_address("10.5.8.0"), ip_address("fd00:5:8::")
    hop = NextHop(DEV, base, onlink=True)
    rows: list[tuple[Table, object, object]] = [
        ("fdb", (DEV, mac), IPv4Address("192.0.2.8")),
        ("neighs", (DEV, base), mac),
        ("neighs", (DEV, base6), mac),
        ("nexthops", hop, True),
        ("routes", ip_network("10.5.8.0/24"), Route(hop)),
        ("routes", ip_network("fd00:5:8::/64"), Route(NextHop(DEV, base6, onlink=True))),
    ]
    monitor.follow(replace(WANT, fdb=FDB | {(DEV, mac): IPv4Address("192.0.2.8")}), SCOPE)
    for table, key, value in rows:
        assert tables.apply([Op("set", table, key, value)])[0].error is None
    address = Op("set", "addrs", (DEV, ip_interface("10.5.35.0/32")), True)
    assert links.apply([address])[0].error is None
    assert monitor.wait(QUIET) is None
    monitor.follow(WANT, SCOPE)
    for table, key, _ in reversed(rows):
        assert tables.apply([Op("del", table, key)])[0].error is None
    assert monitor.wait(QUIET) is None
    # Of links and IPv6 addresses the kernel does not say who changed them.
    address = Op("set", "addrs", (DEV, ip_interface("fd00:5:34::/128")), True)
    assert links.apply([address])[0].error is None
    assert monitor.wait(SOON) == Heard(links=frozenset({DEV}), host=True)


@pytest.mark.parametrize(("version", "network"), [("-4", "203.0.113.0/24"), ("-6", "2001:db8:7::/64")])
def test_what_the_device_below_reaches_without_a_gateway_is_heard(
    net: Namespace, monitor: Monitor, version: str, network: str
) -> None:
    net.ip("link add u9 type bridge", "link set u9 up")
    while monitor.wait(QUIET) is not None:
        pass
    gateway = {"-4": "192.0.2.254", "-6": "fd99::fe"}[version]
    net.ip(f"{version} route add {network} dev u9 metric 7")
    net.ip(f"{version} route add {network} via {gateway} dev u0 metric 8")
    assert monitor.wait(QUIET) is None
    for verb in ("add", "delete"):
        net.ip(f"{version} route {verb} {network} dev u0 metric 9")
        assert monitor.wait(SOON) == Heard(host=True)


def test_a_device_made_later_is_followed(net: Namespace, agent: Agent, monitor: Monitor) -> None:
    monitor.follow(devices(DEV, "flannel-v6.1"), SCOPE)
    links = agent.make(KernelLinks, PREFIX)
    wanted = VxlanLink(1, 8472, "u0", ip_address("fd99::1"), 1430, MAC, link_alias(PREFIX))
    assert links.apply([Op("set", "links", "flannel-v6.1", wanted)])[0].error is None
    heard = monitor.wait(SOON)
    assert heard is not None
    assert "flannel-v6.1" in heard.links
    net.ip(f"neigh add fd00:5:9:: dev flannel-v6.1 lladdr {MAC} nud permanent")
    heard = monitor.wait(SOON)
    assert heard is not None
    assert heard.ours


def test_a_device_that_takes_a_followed_name_is_followed(net: Namespace, monitor: Monitor) -> None:
    monitor.follow(devices("late0"), SCOPE)
    net.ip(f"neigh add 10.5.9.0 dev u0 lladdr {MAC} nud permanent")
    assert monitor.wait(QUIET) is None
    net.ip("link set u0 down", "link set u0 name late0", "link set late0 up")
    heard = monitor.wait(SOON)
    assert heard is not None
    assert "late0" in heard.links
    while monitor.wait(QUIET) is not None:
        pass  # the carrier comes back a little later
    net.ip(f"neigh add 10.5.9.0 dev late0 lladdr {MAC} nud permanent")
    assert monitor.wait(SOON) == Heard(ours=True)


def test_of_unchanged_links_only_the_followed_are_told(net: Namespace, monitor: Monitor) -> None:
    net.ip("link set u0 mtu 1400", f"link set {DEV} mtu 1300")
    assert monitor.wait(SOON) == Heard(links=frozenset({"u0", DEV}), host=True)
    net.ip("link set u0 txqueuelen 77")
    assert monitor.wait(QUIET) is None
    net.ip(f"link set {DEV} type vxlan learning")
    assert monitor.wait(SOON) == Heard(links=frozenset({DEV}))


def test_a_burst_is_one_wakeup_and_cheap(net: Namespace, agent: Agent) -> None:
    tables, monitor = agent.make(RtnetlinkTables, PREFIX), agent.make(Monitor)
    monitor.follow(devices(DEV), SCOPE)
    ops = [Op("set", "neighs", (DEV, IPv4Address(0x0A050000 + n)), MAC) for n in range(10_000)]
    assert all(outcome.error is None for outcome in tables.apply(ops))
    assert monitor.wait(SOON) == Heard(ours=True)
    assert agent.user_seconds < 0.5
    assert monitor.wait(0) is None
    net.ip("neigh add 192.0.2.50 dev u0 lladdr 02:00:00:00:00:50 nud permanent")
    assert monitor.wait(QUIET) is None


def write_many(tables: RtnetlinkTables) -> None:
    """More than fits into a socket that hears of it."""
    subnets = list(IPv4Network("10.5.0.0/16").subnets(new_prefix=30))
    hop = NextHop(DEV, ip_address("10.5.3.0"), onlink=True)
    assert tables.apply([Op("set", "nexthops", hop, True)])[0].error is None
    for verb in ("set", "del", "set", "del"):
        tables.apply([Op("set" if verb == "set" else "del", "routes", s, Route(hop)) for s in subnets])


def test_an_overflow_is_told_and_got_over(net: Namespace, agent: Agent) -> None:
    tables, monitor = agent.make(RtnetlinkTables, PREFIX), agent.make(Monitor)
    monitor.follow(devices(DEV), SCOPE)
    write_many(tables)
    heard = monitor.wait(SOON)
    assert heard is not None
    assert heard.overflow
    assert monitor.wait(0) is None
    net.ip("link set u0 mtu 1400")
    heard = monitor.wait(SOON)
    assert heard is not None
    assert "u0" in heard.links
    assert not heard.overflow


def test_our_own_writes_take_no_room(net: Namespace, agent: Agent) -> None:
    """The kernel keeps them from a socket of ours."""
    tables = agent.make(RtnetlinkTables, PREFIX)
    monitor = agent.make(Monitor, tables.port_ids)
    monitor.follow(devices(DEV), SCOPE)
    write_many(tables)
    assert monitor.wait(QUIET) is None
    net.ip("route add 10.5.77.0/24 dev u0 proto 96")
    assert monitor.wait(SOON) == Heard(ours=True, host=True)


# --- the thread that listens ----------------------------------------------------------------------


def test_a_host_that_could_not_be_read_is_read_again_without_an_event(net: Namespace, agent: Agent) -> None:
    watched = agent.make(Watched, PREFIX, "u0")
    watched.starve()
    net.ip("link set u0 mtu 1400")
    wait_for(watched.problem, SOON, "the failure", lambda text: "netlink socket" in text)
    assert watched.mtu() == 1500
    watched.feed()
    wait_for(watched.mtu, SOON, "the host to be read again", lambda mtu: mtu == 1400)
    assert watched.problem() == ""
