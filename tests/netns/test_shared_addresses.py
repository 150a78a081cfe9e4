"""One address and two hosts: swapped between them while both run, or really given twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import start_pings, wait_held, wait_status
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.registry_history import history, record_at, revision
from tests.netns.scenes import BACKENDS, config, overlay

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

TTL = 6
"""Seconds."""
RUNNING, RESTARTED = "running", "killed and started"


def renumber(*hosts: Host) -> None:
    """Each host gets the address of the next one, all of them at once, and the last one that of the first."""
    numbers = [host.number for host in hosts]
    for host in hosts:
        host.ip("address", "flush", "dev", "eth0", "scope", "global")
    for host, number in zip(hosts, (*numbers[1:], numbers[0]), strict=True):
        host.number = number
        host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
        host.ip("route", "add", "default", "via", "192.0.2.254")
        host.ip("neigh", "flush", "all")


@pytest.mark.parametrize("how", [RUNNING, RESTARTED])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hosts_that_swap_their_addresses_keep_their_subnets(lab: Lab, backend: str, how: str) -> None:
    hosts = alpha, beta = overlay(lab, backend, "alpha", "beta")
    keys, since = [own_key(host) for host in hosts], revision(lab.etcd) + 1
    if how == RESTARTED:
        for host in hosts:
            host.daemon.kill()
    renumber(alpha, beta)
    if how == RESTARTED:
        for host in hosts:
            host.start_daemon()
    assert_settled(lab, backend, dict(zip(keys, hosts, strict=True)))
    assert [event.version for event in history(lab.etcd, since)] == [2, 2], "each has written once"
    assert alpha.pod.ping(beta.pod.address).lost == 0


def test_three_hosts_that_pass_their_addresses_round_keep_their_subnets(lab: Lab) -> None:
    hosts = overlay(lab, "vxlan", "alpha", "beta", "gamma")
    keys = [own_key(host) for host in hosts]
    renumber(*hosts)
    assert_settled(lab, "vxlan", dict(zip(keys, hosts, strict=True)))


def assert_settled(lab: Lab, backend: str, hosts: dict[str, Host]) -> None:
    """Every key names the address that its host has now, and all is well everywhere."""
    wait_for(
        lambda: {key: record["PublicIP"] for key, record in lab.etcd.leases().items()},
        10,
        "the new addresses",
        lambda seen: seen == {key: host.address for key, host in hosts.items()},
    )
    for key, host in hosts.items():
        wait_in_order(host, backend)
        seen = wait_status(
            host.daemon,
            "all to be well",
            lambda seen: (seen["lease"]["state"], seen["state"], seen["problems"]) == ("held", "in sync", []),
        )
        assert seen["lease"]["key"] == key


def test_a_host_that_comes_to_an_address_in_use_has_the_conflict_until_it_is_free(lab: Lab) -> None:
    """It has no other and says so; the other host, its record and its traffic stay."""
    lab.etcd.put_config(config("vxlan"))
    alpha, beta, gamma = hosts = lab.add_hosts("alpha", "beta", "gamma")
    # The address in question on an interface of its own, so that only the registry tells of it.
    beta.run(["sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1"])
    pair = "link add ext0 type veth peer name ext1"
    beta.ip_batch([pair, "link set ext1 up", "link set ext0 up", "address add 192.0.2.50/32 dev ext0"])
    beta.iface = "ext0"
    for host in hosts:
        host.start_daemon([f"--subnet-lease-ttl={TTL}s"]).wait_ready()
    alphas = record_at(lab.etcd, own_key(alpha))
    key = beta.daemon.status()["lease"]["key"]
    for host in (alpha, gamma):
        host.attach_pods()
    ping = start_pings(gamma, alpha)
    beta.ip_batch([f"address add {alpha.address}/32 dev ext0", "address delete 192.0.2.50/32 dev ext0"])

    told = wait_status(beta.daemon, "the conflict", lambda seen: seen["lease"]["state"] == "conflict")
    for part in (alpha.address, alpha.node_id, alphas.key):
        assert part in told["lease"]["reason"]
    assert record_at(lab.etcd, key).record["PublicIP"] == alpha.address
    wait_status(alpha.daemon, "it to be named", lambda seen: key in seen["peers"]["bad"])
    wait_renewal(lab, record_at(lab.etcd, key).lease)
    beta.daemon.kill()
    beta.start_daemon([f"--subnet-lease-ttl={TTL}s"])
    wait_status(beta.daemon, "the conflict again", lambda seen: seen["lease"]["state"] == "conflict")
    wait_renewal(lab, record_at(lab.etcd, key).lease)
    assert record_at(lab.etcd, alphas.key) == alphas
    assert alpha.daemon.status()["lease"]["state"] == "held"
    assert ping.stop().lost == ()

    beta.ip_batch(["address add 192.0.2.77/32 dev ext0", f"address delete {alpha.address}/32 dev ext0"])
    wait_held(beta.daemon, key)
    assert record_at(lab.etcd, key).record["PublicIP"] == "192.0.2.77"
    for host in (alpha, gamma):
        wait_in_order(host, "vxlan")


def wait_renewal(lab: Lab, lease: int) -> None:
    """Until an etcd lease has grown old, and then is as good as new."""

    def left() -> int:
        seconds: int = lab.etcd.ctl_json("lease", "timetolive", f"{lease:x}")["ttl"]
        return seconds

    wait_for(lambda: 0 <= left() <= TTL - 2, TTL, "the lease to grow old", interval=0.1)
    wait_for(lambda: left() >= TTL - 1, TTL, "the lease to be renewed", interval=0.1)
