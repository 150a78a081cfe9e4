"""What the host's routes tell the daemon, against what `ip route` shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from flanneld_py.addresses import PerFamily
from flanneld_py.drivers.kernel import read_host
from flanneld_py.model import HostFacts, Way
from tests.netns.inside import Agent, Namespace


@pytest.fixture
def net() -> Iterator[Namespace]:
    """Two underlays: u0 (192.0.2.1, fd99::1) and v0 (192.0.3.1, fd98::1)."""
    with Namespace() as namespace:
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.addr_gen_mode=1")
        namespace.ip(
            "link set lo up",
            "link add u0 type veth peer name u1",
            "link add v0 type veth peer name v1",
            *(f"link set {dev} up" for dev in ("u0", "u1", "v0", "v1")),
            "addr add 192.0.2.1/24 dev u0",
            "addr add fd99::1/64 dev u0 nodad",
            "addr add 192.0.3.1/24 dev v0",
            "addr add fd98::1/64 dev v0 nodad",
        )
        yield namespace


@pytest.fixture
def agent(net: Namespace) -> Agent:
    return net.agent()


def facts(agent: Agent, *asked: str) -> HostFacts:
    found: HostFacts = agent.call(read_host, [ip_address(text) for text in asked])
    return found


HOPS4 = "nexthop via 192.0.2.9 dev u0 nexthop via 192.0.3.9 dev v0"
BOTH4 = f"route add default {HOPS4}"
BOTH6 = "route add default nexthop via fd99::9 dev u0 nexthop via fd98::9 dev v0"


@pytest.mark.parametrize(
    ("lines", "first", "besides"),
    [
        (("route add default via 192.0.2.9",), PerFamily("u0"), PerFamily()),
        ((BOTH4,), PerFamily("u0"), PerFamily(("v0",))),
        ((BOTH6,), PerFamily(None, "u0"), PerFamily(None, ("v0",))),
        ((BOTH4, "link set v1 down"), PerFamily("u0"), PerFamily()),
        (("route add default nexthop via 192.0.2.8 nexthop via 192.0.2.9",), PerFamily("u0"), PerFamily()),
        (
            ("route add default via 192.0.3.9 metric 5", f"route add default metric 7 {HOPS4}"),
            PerFamily("v0"),
            PerFamily(),
        ),
        (
            (
                "nexthop add id 5 via 192.0.3.9 dev v0",
                "nexthop add id 6 via 192.0.2.9 dev u0",
                "nexthop add id 7 group 5/6",
                "route add default nhid 7",
            ),
            PerFamily("v0"),
            PerFamily(("u0",)),
        ),
    ],
)
def test_a_default_route_with_several_ways(
    net: Namespace,
    agent: Agent,
    lines: tuple[str, ...],
    first: PerFamily[str],
    besides: PerFamily[tuple[str, ...]],
) -> None:
    net.ip(*lines)
    found = facts(agent)
    assert (found.default_devices, found.default_devices_besides) == (first, besides)


def test_gateways_are_those_of_the_default_routes(net: Namespace, agent: Agent) -> None:
    assert facts(agent).gateways == frozenset()
    net.ip(
        "route add default via 192.0.2.9",
        f"route add default metric 9 {HOPS4}",
        "route add default via fd99::9",
        "route add default via inet6 fd98::7 dev v0 metric 50",
        "route add 198.51.100.0/24 via 192.0.2.77",
        "route add default via 192.0.2.66 table 7",
    )
    expected = {"192.0.2.9", "192.0.3.9", "fd99::9", "fd98::7"}
    assert facts(agent).gateways == {ip_address(text) for text in expected}


def test_what_is_reached_without_a_gateway(net: Namespace, agent: Agent) -> None:
    net.ip(
        "route add default dev v0",
        "route add 198.51.100.0/24 dev u0",
        "route add 198.51.101.0/24 via 192.0.2.9 dev u0",
        "route add fd77::/64 dev u0",
        "route add 10.5.9.0/24 dev u0 proto 96",
        "route add blackhole 203.0.113.0/24",
        "route add 198.51.102.0/24 via inet6 fd99::9 dev u0",
    )
    found = facts(agent).onlink
    u0 = {"192.0.2.0/24", "fd99::/64", "198.51.100.0/24", "fd77::/64"}
    assert set(found["u0"]) == {ip_network(text) for text in u0}
    v0 = {"192.0.3.0/24", "fd98::/64", "0.0.0.0/0"}
    assert set(found["v0"]) == {ip_network(text) for text in v0}


@pytest.mark.parametrize(
    ("destination", "way"),
    [
        ("192.0.2.77", ("u0", "192.0.2.1")),
        ("198.51.100.7", ("v0", "192.0.3.1")),
        ("198.51.101.7", ("u0", "192.0.2.3")),
        ("fd98::77", ("v0", "fd98::1")),
        ("fd77::7", ("u0", "fd99::1")),
        ("192.0.3.1", ("lo", "192.0.3.1")),
        ("fd99::1", ("lo", "fd99::1")),
        ("127.0.0.1", ("lo", "127.0.0.1")),
        ("203.0.113.7", None),
        ("198.51.102.7", None),
        ("fd76::7", None),
        ("fd75::7", None),
    ],
)
def test_the_way_to_an_address(
    net: Namespace, agent: Agent, destination: str, way: tuple[str, str] | None
) -> None:
    net.ip(
        "addr add 192.0.2.3/24 dev u0",
        "route add 198.51.100.0/24 via 192.0.3.9",
        "route add 198.51.101.0/24 via 192.0.2.9 src 192.0.2.3",
        "route add blackhole 198.51.102.0/24",
        "route add fd77::/64 via fd99::9",
        "route add unreachable fd76::/64",
    )
    found = facts(agent, destination).ways
    if way is None:
        assert found == {}
        return
    dev, source = way
    assert found == {ip_address(destination): Way(dev, ip_address(source))}
    (shown,) = json.loads(net.run("ip", "-j", "route", "get", destination))
    assert (shown["dev"], shown["prefsrc"]) == (dev, source)
