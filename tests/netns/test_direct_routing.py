"""vxlan with DirectRouting: plain routes on one segment, the tunnel to the other, with a router between."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.oracle import own_key, subnets_of, wait_in_order
from tests.netns.scenes import FAMILIES, MTU, family_config
from tests.netns.test_families import assert_reach_each_other

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

CONNECTED = (("192.0.2.0/24", "2001:db8::/64"), ("198.51.100.0/24", "2001:db8:0:1::/64"))
"""Of each segment."""


def segments_overlay(lab: Lab, families: str) -> list[Host]:
    """Two hosts on the first segment and one on the second, in sync, with a pod each."""
    lab.etcd.put_config(family_config("vxlan", families, DirectRouting=True))
    hosts = [
        lab.add_host(name, segment=segment, families=FAMILIES[families])
        for name, segment in (("alpha", 0), ("beta", 0), ("gamma", 1))
    ]
    lab.start_daemons()
    for host in hosts:
        wait_in_order(host, "vxlan", direct=CONNECTED[host.segment])
    return hosts


@pytest.mark.parametrize("families", FAMILIES)
def test_pods_on_three_hosts_of_two_segments_reach_each_other(lab: Lab, families: str) -> None:
    hosts = segments_overlay(lab, families)
    mtu = MTU["vxlan", families]
    assert {host.subnet_env()["FLANNEL_MTU"] for host in hosts} == {str(mtu)}
    assert_reach_each_other(hosts, dict.fromkeys((4, 6), mtu))


@pytest.mark.parametrize("families", FAMILIES)
def test_the_tunnel_carries_only_what_crosses_the_router(lab: Lab, families: str) -> None:
    alpha, beta, gamma = segments_overlay(lab, families)
    lab.underlay.drop(["udp dport 8472"])
    for address in beta.pod.addresses:
        assert alpha.pod.ping(str(address)).lost == 0
    assert lab.underlay.dropped() == 0
    for address in gamma.pod.addresses:
        assert alpha.pod.ping(str(address), count=1).received == 0
    assert lab.underlay.dropped() >= len(gamma.pod.addresses)


def off_link(host: Host) -> None:
    """Take away the network routes of eth0: everybody but the router is then beyond it."""
    router = {"-4": "192.0.2.254", "-6": "2001:db8::fe"}
    for version, network in zip(router, CONNECTED[0], strict=True):
        host.run(["ip", version, "route", "add", router[version], "dev", "eth0", "scope", "link"])
        host.run(["ip", version, "route", "delete", network, "dev", "eth0"])


def on_link(host: Host) -> None:
    """Undo `off_link`."""
    for version, network in zip(("-4", "-6"), CONNECTED[0], strict=True):
        host.run(["ip", version, "route", "add", network, "dev", "eth0", "proto", "kernel"])


def test_it_follows_the_routes_of_the_interface_live(lab: Lab) -> None:
    alpha, beta, _ = segments_overlay(lab, "dual-stack")
    off_link(alpha)
    wait_in_order(alpha, "vxlan")
    for address in beta.pod.addresses:
        assert alpha.pod.ping(str(address)).lost == 0, "into the tunnel, and directly back"
    on_link(alpha)
    wait_in_order(alpha, "vxlan", direct=CONNECTED[0])
    for address in beta.pod.addresses:
        assert alpha.pod.ping(str(address)).lost == 0


def test_switched_off_live_everything_is_tunnelled_and_back(lab: Lab) -> None:
    alpha, beta, gamma = segments_overlay(lab, "dual-stack")
    key = own_key(alpha)
    ping = alpha.pod.start_ping(beta.pod.address, interval=0.02)
    wait_for(ping.answered, 5, "answers", lambda count: count > 5)
    for enabled in (False, True):
        lab.etcd.put_config(family_config("vxlan", "dual-stack", DirectRouting=enabled))
        for host in (alpha, beta, gamma):
            wait_in_order(host, "vxlan", direct=CONNECTED[host.segment] if enabled else ())
    assert ping.stop().lost == ()
    assert own_key(alpha) == key


def test_a_restart_in_direct_mode_writes_nothing(lab: Lab) -> None:
    alpha, *_ = segments_overlay(lab, "dual-stack")
    alpha.daemon.kill()
    daemon = alpha.start_daemon()
    daemon.wait_ready()
    wait_for(lambda: daemon.status()["state"], 5, "in sync", lambda state: state == "in sync")
    assert daemon.status()["drift"]["ops"] == {"set": 0, "del": 0}


def test_drift_of_a_direct_route_is_repaired(lab: Lab) -> None:
    alpha, beta, _ = segments_overlay(lab, "dual-stack")
    for family, subnet in subnets_of(own_key(beta)).items():
        alpha.run(["ip", f"-{family}", "route", "delete", subnet])
        wait_in_order(alpha, "vxlan", direct=CONNECTED[0])
    text = str(alpha.daemon.status()["drift"]["repaired"])
    assert re.search("'routes': [23]", text), text
