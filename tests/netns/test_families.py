"""The main job in IPv4, IPv6 and both: pods on different hosts reach each other, with the right MTU."""

from __future__ import annotations

import itertools
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import Transfer, wait_for
from tests.netns.observing import wait_problem, wait_status
from tests.netns.oracle import actual, device_of, differences, own_key, subnets_of, wait_in_order
from tests.netns.scenes import BACKENDS, FAMILIES, MTU, NETWORK, NETWORK6, family_config

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

ROOT = Path(__file__).parents[2]
TRANSFER = 1_000_000
"""Bytes."""
WITH_IPV6 = [(backend, families) for backend, families in MTU if families != "ipv4"]


def family_overlay(lab: Lab, backend: str, families: str, *names: str) -> list[Host]:
    """Hosts that have only these IP versions, with daemons in sync and a pod each."""
    lab.etcd.put_config(family_config(backend, families))
    hosts = lab.add_hosts(*names, families=FAMILIES[families])
    if backend == "udp":
        for host in hosts:
            host.keep_descriptors()
    lab.start_daemons()
    for host in hosts:
        wait_in_order(host, backend)
    return hosts


def assert_reach_each_other(hosts: list[Host], mtus: dict[int, int]) -> None:
    """Every pod every other one: full packets of each family that may not be fragmented, and TCP."""
    for one, other in itertools.permutations(hosts, 2):
        for address in other.pod.addresses:
            result = one.pod.ping(str(address), count=3, size=mtus[address.version], df=True)
            assert result.lost == 0, f"{one.name} to {other.name}, {address}"
            transfer = Transfer(one.pod, other.pod, str(address), TRANSFER)
            assert transfer.finish() == TRANSFER


@pytest.mark.parametrize(("backend", "families"), MTU)
def test_pods_on_three_hosts_reach_each_other(lab: Lab, backend: str, families: str) -> None:
    hosts = family_overlay(lab, backend, families, "alpha", "beta", "gamma")
    mtu = MTU[backend, families]
    for host in hosts:
        subnets = subnets_of(own_key(host))
        assert tuple(subnets) == FAMILIES[families]
        want = {"FLANNEL_MTU": str(mtu), "FLANNEL_IPMASQ": "false"}
        if 4 in subnets:
            want |= {"FLANNEL_NETWORK": NETWORK, "FLANNEL_SUBNET": subnets[4].replace(".0/", ".1/")}
        if 6 in subnets:
            want |= {
                "FLANNEL_IPV6_NETWORK": NETWORK6,
                "FLANNEL_IPV6_SUBNET": subnets[6].replace("::/", "::1/"),
            }
        assert host.subnet_env() == want
        assert [pod.addresses[0].version for pod in host.pods] == [FAMILIES[families][0]]
        assert len(host.pod.addresses) == len(FAMILIES[families])
    assert_reach_each_other(hosts, dict.fromkeys((4, 6), mtu))


@pytest.mark.parametrize(("backend", "families"), WITH_IPV6)
def test_rows_of_either_family_that_others_remove_come_back(lab: Lab, backend: str, families: str) -> None:
    alpha, beta = family_overlay(lab, backend, families, "alpha", "beta")
    networks = {4: NETWORK, 6: NETWORK6} if backend == "udp" else subnets_of(own_key(beta))
    commands = [f"ip -{family} route delete {network}" for family, network in networks.items()]
    if backend == "udp":
        commands += [
            "ip -6 address flush dev flannel0 scope global",
            "ip link set flannel0 mtu 1300",
            "ip link delete flannel0",
        ]
    if backend == "vxlan":
        record, base = lab.etcd.leases()[own_key(beta)], subnets_of(own_key(beta))[6].partition("/")[0]
        mac = record["BackendV6Data"]["VtepMAC"]
        commands += [
            f"ip -6 neigh delete {base} dev flannel-v6.1",
            f"bridge fdb delete {mac} dev flannel-v6.1 dst {beta.address6}",
            f"bridge fdb replace {mac} dev flannel-v6.1 dst 2001:db8::99 self permanent",
            f"ip -6 neigh replace {base} dev flannel-v6.1 lladdr 02:00:00:00:00:99 nud permanent",
            "ip -6 address flush dev flannel-v6.1 scope global",
            "ip link set flannel-v6.1 mtu 1300",
            "ip link delete flannel-v6.1",
        ]
    for command in commands:
        alpha.run(command.split())
        wait_in_order(alpha, backend)
    for address in beta.pod.addresses:
        assert alpha.pod.ping(str(address)).lost == 0


@pytest.mark.parametrize(("backend", "families"), MTU)
def test_a_restart_writes_nothing(lab: Lab, backend: str, families: str) -> None:
    alpha, beta = family_overlay(lab, backend, families, "alpha", "beta")
    before = lab.etcd.leases()
    alpha.daemon.kill()
    daemon = alpha.start_daemon()
    daemon.wait_ready()
    status = wait_status(daemon, "it to be in sync", lambda seen: seen["state"] == "in sync")
    assert status["drift"]["ops"] == {"set": 0, "del": 0}
    assert lab.etcd.leases() == before
    wait_in_order(beta, backend)


@pytest.mark.parametrize(("backend", "families"), WITH_IPV6)
def test_cleanup_leaves_nothing_of_either_family(lab: Lab, backend: str, families: str) -> None:
    alpha, _ = family_overlay(lab, backend, families, "alpha", "beta")
    alpha.daemon.terminate()
    flags = [flag for flag in alpha.flags if not flag.startswith(("--node-id", "--iface"))]
    alpha.run([sys.executable, "-m", "flanneld_py.cli.ctl.main", *flags, "cleanup"])
    assert actual(alpha, backend) == {}
    assert {link["ifname"] for link in alpha.ip("link", "show")} == {"lo", "eth0", "cni0", "pod1"}
    assert [row for v in ("-4", "-6") for row in alpha.ip(v, "route", "show", "proto", "96")] == []


@pytest.mark.parametrize(
    ("missing", "families"), [(6, "dual-stack"), (4, "dual-stack"), (6, "ipv6"), (4, "ipv4")]
)
def test_an_address_that_the_config_needs_is_named_and_waited_for(
    lab: Lab, missing: int, families: str
) -> None:
    lab.etcd.put_config(family_config("vxlan", families))
    host = lab.add_host("alpha", families=[family for family in (4, 6) if family != missing])
    # Flannel takes a link-local address if there is no better one.
    host.run(["ip", "-6", "address", "flush", "dev", "eth0", "scope", "link"])
    daemon = host.start_daemon()
    status = wait_problem(daemon, "host-interface", f"eth0 has no usable IPv{missing} address")
    assert (status["state"], status["ready"], status["lease"]["state"]) == ("waiting", False, "none")
    assert lab.etcd.leases() == {}
    text = {4: f"{host.address}/24", 6: f"{host.address6}/64"}[missing]
    host.ip("address", "add", text, "dev", "eth0")
    daemon.wait_ready()
    wait_in_order(host, "vxlan")
    assert tuple(subnets_of(own_key(host))) == FAMILIES[families]


@pytest.mark.parametrize("families", ["dual-stack", "ipv6"])
def test_router_advertisements_inside_the_overlay_are_ignored(lab: Lab, families: str) -> None:
    (alpha,) = family_overlay(lab, "vxlan", families, "alpha")
    devices = [device_of(family) for family in FAMILIES[families]]
    for device in devices:
        assert alpha.run(["cat", f"/proc/sys/net/ipv6/conf/{device}/accept_ra"]) == "0\n"


@pytest.mark.parametrize("families", ["dual-stack", "ipv6"])
def test_a_host_that_disables_ipv6_where_it_is_not_asked_for_has_it_in_the_overlay(
    lab: Lab, families: str
) -> None:
    """As hosts do whose administrators want no IPv6 on what comes by itself."""
    lab.etcd.put_config(family_config("vxlan", families))
    hosts = alpha, beta = lab.add_hosts("alpha", "beta", families=FAMILIES[families])
    for host in hosts:
        host.run(["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"])
        host.start_daemon()
    for host in hosts:
        host.daemon.wait_ready()
    for host in hosts:
        wait_in_order(host, "vxlan")
    alpha.run(["sysctl", "-qw", "net.ipv6.conf.flannel-v6/1.disable_ipv6=1"])
    wait_for(lambda: differences(alpha, "vxlan"), 2, "IPv6 to be back", lambda rows: not rows)
    assert beta.daemon.status()["drift"]["repaired"] == {}


def test_host_gw_names_a_next_hop_that_is_not_on_link(lab: Lab) -> None:
    """The row stays wanted: once the host is connected to that network, it stands."""
    lab.etcd.put_config(family_config("host-gw", "dual-stack"))
    alpha, gamma = lab.add_host("alpha"), lab.add_host("gamma", segment=1)
    lab.start_daemons()
    said = [f"next hop {address} is not on-link" for address in (gamma.address, gamma.address6)]
    status = wait_status(
        alpha.daemon,
        "both to be named",
        lambda seen: all(text in str(seen["drift"]["failed"]) for text in said),
    )
    assert status["peers"]["count"] == 1
    (problem,) = status["problems"]
    assert problem["code"] == "apply-failed"
    assert "connect both hosts to one layer 2 segment, or set Backend.Type to vxlan" in problem["reason"]
    alpha.ip("-4", "route", "add", gamma.address, "dev", "eth0")
    alpha.ip("-6", "route", "add", gamma.address6, "dev", "eth0")
    wait_in_order(alpha, "host-gw")


@pytest.mark.parametrize("families", FAMILIES)
def test_alloc_leases_and_tells_and_touches_nothing(lab: Lab, families: str) -> None:
    lab.etcd.put_config(family_config("alloc", families))
    hosts = lab.add_hosts("alpha", "beta", families=FAMILIES[families])
    before = [traces(host) for host in hosts]
    for host in hosts:
        host.start_daemon().wait_ready()
    records = lab.etcd.leases()
    assert len(records) == len(hosts)
    for host, seen in zip(hosts, before, strict=True):
        status = wait_status(host.daemon, "it to be in sync", lambda seen: seen["state"] == "in sync")
        assert (status["backend"], status["problems"]) == ("alloc", [])
        assert not records[own_key(host)].keys() & {"BackendType", "BackendData", "BackendV6Data"}
        assert host.subnet_env()["FLANNEL_MTU"] == "1500"
        assert [str(gateway.network) for gateway in host.gateways()] == [*subnets_of(own_key(host)).values()]
        assert traces(host) == seen


def traces(host: Host) -> list[object]:
    shown = (("link",), ("-4", "route"), ("-6", "route"), ("nexthop",))
    return [host.ip(*what, "show") for what in shown]


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_between_two_writes_of_a_dual_stack_start_the_next_one_ends_it(
    lab: Lab, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha, _ = family_overlay(lab, backend, "dual-stack", "alpha", "beta")
    alpha.daemon.terminate()
    for writes in {"host-gw": (1, 3, 5), "udp": (1, 3, 5, 7), "vxlan": (1, 4, 7, 9, 11)}[backend]:
        wipe(alpha)
        command = (sys.executable, "-m", "tests.netns.die_at", str(writes), "daemon")
        with monkeypatch.context() as patched:
            patched.setattr("flanneld_py.lab.daemon.COMMAND", command)
            patched.chdir(ROOT)
            daemon = alpha.start_daemon()
        assert daemon.wait_exit() == -signal.SIGKILL
        rows = actual(alpha, backend)
        gateways = (
            [
                how.split()[1]
                for what, how in rows.items()
                if what.startswith("route") and "dev flannel" in how
            ]
            if backend != "udp"
            else []
        )
        assert [via for via in gateways if f"fdb {rows.get(f'neigh {via}')}" not in rows] == []
        alpha.start_daemon().wait_ready()
        wait_in_order(alpha, backend)
        alpha.daemon.kill()


def wipe(host: Host) -> None:
    """As after a reinstallation: nothing in the kernel, no files."""
    for kind in ("vxlan", "tun"):
        for link in host.ip("link", "show", "type", kind):
            host.ip("link", "delete", link["ifname"])
    if host.manager is not host.notify:
        host.drop_descriptors()
        host.keep_descriptors()
    host.run(["ip", "nexthop", "flush", "proto", "2"])
    host.run(["ip", "-6", "route", "flush", "proto", "96"])
    for directory in (host.run_directory, host.state_directory):
        shutil.rmtree(directory, ignore_errors=True)
