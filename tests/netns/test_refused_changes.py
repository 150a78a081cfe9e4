"""A live change of the config that the kernel or this host refuses: what worked goes on working."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import CommandFailed, wait_for
from tests.netns.observing import codes, start_pings, wait_answers, wait_problem, wait_status
from tests.netns.oracle import actual, wait_in_order
from tests.netns.peers import change_peers, make_peers
from tests.netns.scenes import FAMILIES, config, family_config, overlay
from tests.netns.test_config_changes import apply, change, talk, vxlan_devices, wait_well
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab, PingRun

LINUX = tuple(int(part) for part in os.uname().release.split(".")[:2])
OTHER_ADDRESS = "192.0.2.177"
ON_PORT_4789 = "id 1 dstport 4789"
TAKEN: dict[str, tuple[dict[str, Any], str]] = {
    "VNI": ({"VNI": 7}, "id 7 dstport 8472"),
    "port": ({"Port": 4789}, ON_PORT_4789),
    "VNI and port": ({"VNI": 7, "Port": 4789}, "id 7 dstport 4789"),
    "port, with GBP": ({"Port": 4789, "GBP": True}, ON_PORT_4789),
}
"""Name → options that the config gets, and the device of somebody else's that is in the way."""


@pytest.mark.parametrize("what", TAKEN)
def test_what_cannot_be_made_leaves_the_old_device_and_its_peers(lab: Lab, what: str) -> None:
    options, foreign = TAKEN[what]
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    for host in (one, other):
        host.run(["ip", *f"link add foreign type vxlan {foreign} dev eth0".split()])
        host.run(["ip", "link", "set", "foreign", "up"])
    before = {host.name: actual(host, "vxlan") for host in (one, other)}
    pings = start_pings(one, other)
    change(lab, options=options)
    for host in (one, other):
        wait_problem(host.daemon, "apply-failed", "foreign" if options.keys() < {"VNI", "Port"} else "")
        assert actual(host, "vxlan") == before[host.name]
    assert not pings.stop().lost
    assert {*vxlan_devices(one)} == {"flannel.1", "foreign"}

    for host in (one, other):
        host.run(["ip", "link", "delete", "foreign"])
        os.kill(host.daemon.pid, signal.SIGHUP)
    for host in (one, other):
        wait_well(host)
        (made,) = vxlan_devices(host).values()
        assert made == (options.get("VNI", 1), options.get("Port", 8472))
    talk(one, other)


def test_a_change_that_was_refused_is_taken_back(lab: Lab) -> None:
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    one.run(["ip", "link", "add", "foreign", "type", "vxlan", "id", "7", "dstport", "8472", "dev", "eth0"])
    change(lab, options={"VNI": 7})
    wait_problem(one.daemon, "apply-failed", "it is foreign: remove that, or choose another VNI")
    change(lab)
    for host in (one, other):
        wait_well(host)
        wait_in_order(host, "vxlan")
    talk(one, other)


@pytest.mark.skipif(
    LINUX < (6, 2), reason="before Linux 6.2 a device must be down to be renamed, and loses its routes"
)
@pytest.mark.parametrize("kind", ["bridge", "vxlan id 9 dstport 4790 dev eth0"])
def test_a_device_whose_name_another_has_taken_goes_on_working_under_its_own(lab: Lab, kind: str) -> None:
    """It is in the way of the one that is wanted, which cannot be made either."""
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    ping = start_pings(one, other)
    one.ip_batch([f"link add foreign type {kind}"])
    one.daemon.send_signal(signal.SIGSTOP)
    try:
        one.ip_batch(["link set flannel.1 name lost0", "link set foreign name flannel.1"])
    finally:
        one.daemon.send_signal(signal.SIGCONT)
    (before,) = one.ip("link", "show", "dev", "lost0")
    wait_problem(one.daemon, "apply-failed", "device flannel.1 exists and is not ours")
    for _ in range(2):
        os.kill(one.daemon.pid, signal.SIGHUP)
        wait_answers(ping)
    (after,) = one.ip("link", "show", "dev", "lost0")
    assert after["ifindex"] == before["ifindex"]
    assert ping.stop().lost == ()

    one.ip("link", "delete", "flannel.1")
    wait_in_order(one, "vxlan")
    assert {*vxlan_devices(one)} == {"flannel.1"}


@pytest.mark.parametrize(
    "foreign",
    ["id 7 dstport 8472", "id 9 dstport 8472"],
    ids=["with the VNI", "with other marks on the port"],
)
def test_a_device_goes_only_when_what_it_makes_room_for_can_be_made(lab: Lab, foreign: str) -> None:
    """With GBP a socket of its own is needed, which the port has only once."""
    one, other = overlay(lab, "vxlan", "alpha", "beta")
    marks = " gbp" if "id 7" in foreign else ""
    one.ip_batch([f"link add foreign type vxlan {foreign} dev eth0{marks}"])
    if not marks:
        one.ip("link", "set", "foreign", "up")
    (before,) = one.ip("link", "show", "dev", "flannel.1")
    ping = start_pings(one, other)
    other.daemon.terminate()
    change(lab, options={"VNI": 7, "GBP": True})
    wait_problem(one.daemon, "apply-failed", "foreign")
    os.kill(one.daemon.pid, signal.SIGHUP)
    wait_answers(ping)
    (after,) = one.ip("link", "show", "dev", "flannel.1")
    assert after["ifindex"] == before["ifindex"]
    assert ping.stop().lost == ()

    one.ip("link", "delete", "foreign")
    other.start_daemon()
    for host in (one, other):
        wait_well(host, state="in sync")
        assert {*vxlan_devices(host)} == {"flannel.7"}
    talk(one, other)


def start_families(lab: Lab, families: str) -> list[Host]:
    lab.etcd.put_config(family_config("vxlan", families))
    hosts = lab.add_hosts("alpha", "beta", families=FAMILIES[families])
    lab.start_daemons()
    for host in hosts:
        wait_in_order(host, "vxlan")
    return hosts


def ping6(one: Host, other: Host) -> PingRun:
    ping = one.pod.start_ping(str(other.pod.addresses[-1]))
    wait_answers(ping)
    return ping


@pytest.mark.parametrize("families", ["dual-stack", "ipv6"])
def test_an_mtu_too_small_for_ipv6_is_refused_by_all(lab: Lab, families: str) -> None:
    one, other = start_families(lab, families)
    before = actual(one, "vxlan")
    small = family_config("vxlan", families, MTU=1349)
    said = "Backend.MTU 1349: expected 1350 to 65535"
    for command in ("check", "set"):
        refused = flannelctl(one, "config", command, json.dumps(small))
        assert (refused.code, said in refused.err) == (1, True), refused
    ping = ping6(one, other)
    lab.etcd.put_config(small)
    for host in (one, other):
        wait_problem(host.daemon, "config-invalid", said)
    assert actual(one, "vxlan") == before
    lab.etcd.put_config(family_config("vxlan", families, MTU=1350))
    for host in (one, other):
        wait_well(host, mtu=1280)
    assert not ping.stop().lost


@pytest.mark.parametrize("families", ["dual-stack", "ipv6"])
def test_an_interface_that_becomes_too_small_for_ipv6_costs_no_peer(lab: Lab, families: str) -> None:
    one, other = start_families(lab, families)
    before = actual(one, "vxlan")
    ping = ping6(one, other)
    one.ip("link", "set", "eth0", "mtu", "1300")
    wait_problem(one.daemon, "apply-failed", "IPv6 needs 1280 there: raise the MTU of eth0 to 1350")
    now = actual(one, "vxlan")
    assert {row: how for row, how in before.items() if not row.startswith("link flannel.")} == {
        row: how for row, how in now.items() if not row.startswith("link flannel.")
    }
    one.ip("link", "set", "eth0", "mtu", "1500")
    wait_well(one, mtu=1430)
    wait_in_order(one, "vxlan")
    assert not ping.stop().lost


def test_a_backend_that_this_host_cannot_do_is_not_taken_over(lab: Lab) -> None:
    """host-gw routes to a host's own address, which that behind NAT does not publish."""
    lab.etcd.put_config(config("vxlan"))
    host = lab.add_host("alpha")
    host.start_daemon(["--public-ip=203.0.113.9"]).wait_ready()
    peers = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, "vxlan", put=peers[:1])
    wait_status(host.daemon, "the peer", lambda seen: seen["peers"]["count"] == 1)
    (key,) = {*lab.etcd.leases()} - {peer.key for peer in peers}
    change(lab, "host-gw")
    problem = wait_problem(host.daemon, "config-unfit", "use vxlan behind NAT")["problems"][0]
    assert problem["fix"]
    with pytest.raises(CommandFailed, match="not applied, the config in force stays: --public-ip 203"):
        apply(host)
    assert "nothing to change" in flannelctl(host, "plan").out

    # What is in force is kept in order and followed, the lease as well.
    before = actual(host, "vxlan")
    host.ip("link", "delete", "flannel.1")
    wait_for(lambda: actual(host, "vxlan"), 5, "the rows", lambda rows: rows == before)
    change_peers(lab.etcd, "vxlan", put=peers)
    wait_status(host.daemon, "both peers", lambda seen: seen["peers"]["count"] == 2)
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/{key}")
    wait_for(lab.etcd.leases, 5, "the lease", lambda leases: key in leases)

    host.ip("address", "add", "203.0.113.9/32", "dev", "eth0")
    wait_status(host.daemon, "the problem to be the same", lambda seen: codes(seen) == ["config-unfit"])
    change(lab)
    wait_well(host, backend="vxlan")


def test_a_host_that_can_no_longer_do_its_backend_keeps_what_it_has(lab: Lab) -> None:
    lab.etcd.put_config(config("host-gw"))
    host = lab.add_host("alpha")
    host.start_daemon([f"--public-ip={host.address}"]).wait_ready()
    peers = make_peers(lab.etcd, 2)
    change_peers(lab.etcd, "host-gw", put=peers[:1])
    (subnet,) = [peer.subnet for peer in peers[:1]]
    wait_for(lambda: actual(host, "host-gw"), 5, "the route", lambda rows: f"route {subnet}" in rows)
    host.ip_batch([f"address delete {host.address}/24 dev eth0", f"address add {OTHER_ADDRESS}/24 dev eth0"])
    problem = wait_status(host.daemon, "the problem", lambda seen: "reconcile-failed" in codes(seen))[
        "problems"
    ]
    assert "what worked before stays in force" in str(problem)
    assert all(told["fix"] for told in problem)
    change_peers(lab.etcd, "host-gw", put=peers)
    wait_for(
        lambda: actual(host, "host-gw"),
        5,
        "the route to the new peer",
        lambda rows: all(f"route {peer.subnet}" in rows for peer in peers),
    )
    host.ip("route", "delete", subnet)
    wait_for(lambda: actual(host, "host-gw"), 5, "the route", lambda rows: f"route {subnet}" in rows)
    host.ip_batch([f"address delete {OTHER_ADDRESS}/24 dev eth0", f"address add {host.address}/24 dev eth0"])
    wait_well(host, backend="host-gw")
