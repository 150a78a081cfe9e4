"""Which address each side sees, by each tool that writes rules; pods keep theirs within the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import wait_status
from tests.netns.packet_filters import TOOLS, Echo, filter_config, filtered_overlay, rules_text, seen_from
from tests.netns.scenes import BACKENDS

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab


def own_address(host: Host, backend: str, version: int) -> str:
    """From which the host itself speaks to the overlay."""
    if backend == "host-gw":
        return host.address if version == 4 else host.address6
    subnet = next(gateway.network for gateway in host.gateways() if gateway.version == version)
    return str(subnet.network_address)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tool", TOOLS)
def test_who_is_seen_as_whom(lab: Lab, tool: str, backend: str) -> None:
    alpha, beta = filtered_overlay(lab, tool, "alpha", "beta", backend=backend, families="dual-stack")
    world = lab.add_host("world")
    (second,) = alpha.attach_pods()
    for there in (alpha.pod, second, beta.pod, world):
        Echo(there)
    for n, version in enumerate((4, 6)):
        a, a2, b = (str(pod.addresses[n]) for pod in (alpha.pod, second, beta.pod))
        outside, host = (each.address if version == 4 else each.address6 for each in (world, alpha))
        network = "10.5.0.0/16" if version == 4 else "fd00:5::/48"
        world.run(["ip", f"-{version}", "route", "add", network, "via", host])
        own = own_address(alpha, backend, version)
        assert seen_from(alpha.pod, a2) == a, "same host"
        assert seen_from(alpha.pod, b) == a, "other host"
        assert seen_from(alpha.pod, outside) == host, "to the outside"
        assert seen_from(alpha, b) == own, "the host itself"
        assert seen_from(world, a) == outside, "from outside to a pod of the host that it asks"
        assert seen_from(world, b) == own, "from outside through the host to a pod of another"


@pytest.mark.parametrize("tool", TOOLS)
def test_without_masquerading_pods_are_seen_outside(lab: Lab, tool: str) -> None:
    (alpha,) = filtered_overlay(lab, tool, "alpha", args=["--ip-masq=false"])
    assert alpha.subnet_env()["FLANNEL_IPMASQ"] == "false"
    world = lab.add_host("world")
    world.run(["ip", "route", "add", "10.5.0.0/16", "via", alpha.address])
    Echo(world)
    assert seen_from(alpha.pod, world.address) == str(alpha.pod.address)


def test_masquerading_is_switched_on_and_off_by_a_restart(lab: Lab) -> None:
    (alpha,) = filtered_overlay(lab, "nft", "alpha")
    assert alpha.subnet_env()["FLANNEL_IPMASQ"] == "true"
    assert "masquerade" in rules_text(alpha, "nft")
    for given, there in (("false", False), ("true", True)):
        assert alpha.daemon.terminate() == 0
        alpha.start_daemon([f"--ip-masq={given}"]).wait_ready()
        wait_status(alpha.daemon, "the daemon to be in sync", lambda seen: seen["state"] == "in sync")
        assert ("masquerade" in rules_text(alpha, "nft")) is there
        assert alpha.subnet_env()["FLANNEL_IPMASQ"] == given


def test_the_tool_is_changed_by_the_config_while_traffic_goes_on(lab: Lab) -> None:
    alpha, beta = filtered_overlay(lab, "iptables-nft", "alpha", "beta")
    ping = alpha.pod.start_ping(beta.pod.address)
    lab.etcd.put_config(filter_config("vxlan", "nft"))
    wait_for(lambda: "flannel-ipv4" in rules_text(alpha, "nft"), 5, "rules by nft")
    wait_for(lambda: "FLANNEL" not in rules_text(alpha, "iptables-nft"), 5, "none by iptables any more")
    lab.etcd.put_config(filter_config("vxlan", "iptables-nft"))
    wait_for(lambda: "FLANNEL-POSTRTG" in rules_text(alpha, "iptables-nft"), 5, "rules by iptables")
    wait_for(lambda: "flannel-ipv4" not in rules_text(alpha, "nft"), 5, "none by nft any more")
    assert ping.stop().lost == ()
