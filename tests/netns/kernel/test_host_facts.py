"""What the drivers read of a host, against what `ip -j` shows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from flanneld_py.addresses import PerFamily
from flanneld_py.drivers.kernel import read_host
from tests.netns.inside import Namespace

if TYPE_CHECKING:
    from tests.netns.inside import Agent


def test_host_facts_are_those_ip_shows(net: Namespace, agent: Agent) -> None:
    net.ip(
        "link add flannel.1 type vxlan id 1 dstport 8472 dev u0",
        "link set flannel.1 alias some_words",
        "link add br0 type bridge",
        "addr add 10.1.1.1 peer 10.1.1.2/32 dev v0",
        "addr add 192.0.9.77/24 dev u0 scope link",
        "addr add fd99::2/64 dev u0 nodad preferred_lft 0 valid_lft 1000",
        "link set v0 mtu 1300",
        "link set lo down",
    )
    facts = agent.call(read_host)
    rows = {row["ifname"]: row for row in net.show("addr")}
    assert facts.ipv6
    assert [link.name for link in facts.links] == list(rows)
    for link in facts.links:
        row = rows[link.name]
        assert (link.index, link.mtu, link.mac) == (row["ifindex"], row["mtu"], row["address"])
        assert link.up == ("UP" in row["flags"])
        assert link.kind == row.get("linkinfo", {}).get("info_kind", "")
        assert link.alias == row.get("ifalias", "")
        assert {
            (str(a.address), a.scope, a.deprecated, a.permanent, a.secondary) for a in link.addresses
        } == {
            (
                f"{a['local']}/{a['prefixlen']}",
                a["scope"],
                a.get("deprecated", False),
                not a.get("dynamic", False),
                a.get("secondary", False),
            )
            for a in row["addr_info"]
        }


def test_host_facts_with_a_name_that_is_no_utf8(net: Namespace, agent: Agent) -> None:
    net.run("ip", "link", "add", os.fsdecode(b"caf\xe9"), "type", "bridge")
    assert "caf\\xe9" in {link.name for link in agent.call(read_host).links}


FIRST, SECOND = "route add default via 192.0.3.9", "route add default via 192.0.2.9"


@pytest.mark.parametrize(
    ("lines", "devices"),
    [
        ((), PerFamily()),
        (("route add default via 192.0.2.254",), PerFamily(v4="u0")),
        (("route add default via fd99::9",), PerFamily(v6="u0")),
        (("route add default dev v0 table 7", "route add 0.0.0.0/1 via 192.0.2.254"), PerFamily()),
        (("route add blackhole default",), PerFamily()),
        (("route add default nexthop via 192.0.3.9 nexthop via 192.0.2.9",), PerFamily("v0")),
        (("nexthop add id 5 via 192.0.3.9 dev v0", "route add default nhid 5"), PerFamily("v0")),
        ((f"{FIRST} metric 9", f"{SECOND} metric 50"), PerFamily("v0")),
        ((FIRST, f"{SECOND} metric 9", "link set v1 down"), PerFamily("u0")),
    ],
)
def test_the_default_routes_device(
    net: Namespace, agent: Agent, lines: tuple[str, ...], devices: PerFamily[str]
) -> None:
    net.ip(*lines)
    assert agent.call(read_host).default_devices == devices
