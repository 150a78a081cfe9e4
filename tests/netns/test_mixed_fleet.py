"""A registry of a thousand hosts, half of them of Go flannel: each sees the other."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.go_hosts import peers_of, start_fleet, start_go, wait_peers
from tests.netns.observing import start_pings, wait_status
from tests.netns.oracle import own_key, wait_in_order
from tests.netns.scenes import BACKENDS, config

if TYPE_CHECKING:
    from flanneld_py.lab import EtcdServer, Host, Lab

HALF = 500
PER_TRANSACTION = 100
WIDE = {"Network": "10.4.0.0/14", "SubnetLen": 24}
ROOMY = 30
"""Seconds in which a host of Go flannel, one command after the other, has all routes."""


def clone_records(etcd: EtcdServer, template: dict[str, object], count: int) -> None:
    """Records as one of our daemons writes them, of as many other hosts."""
    taken = {key.partition("-")[0] for key in etcd.leases()}
    bases = (f"10.{second}.{third}.0" for second in (6, 7) for third in range(256))
    free = [base for base in bases if base not in taken][:count]
    assert len(free) == count
    lease = etcd.grant(86_400)
    puts = []
    for number, base in enumerate(free):
        mac = f"02:70:00:00:{number >> 8:02x}:{number & 255:02x}"
        record = {
            **template,
            "PublicIP": str(IPv4Address("198.19.0.1") + number),
            "NodeID": f"cloned-{number}",
        }
        if "BackendData" in template:
            record["BackendData"] = {"VNI": 1, "VtepMAC": mac}
        value = json.dumps(json.dumps(record, separators=(",", ":")))
        puts.append(f"put --lease={lease} {etcd.prefix}/subnets/{base}-24 {value}")
    for first in range(0, count, PER_TRANSACTION):
        etcd.ctl("txn", text="\n" + "\n".join(puts[first : first + PER_TRANSACTION]) + "\n\n\n")


def route_to_fleet(host: Host) -> None:
    """host-gw demands next hops that are on-link: the fleet's addresses count as such here."""
    host.ip_batch(["route add 198.18.0.0/15 dev eth0"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_hosts_of_both_kinds(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend, **WIDE))
    ours, go = lab.add_hosts("alpha", "beta"), lab.add_hosts("gamma", "delta")
    for host in (*ours, *go) if backend == "host-gw" else ():
        route_to_fleet(host)
    for host in ours:
        host.start_daemon().wait_ready()
    for host in go:
        start_go(host)
    template = lab.etcd.leases()[own_key(ours[0])]
    clone_records(lab.etcd, template, HALF - len(ours))
    start_fleet(go[0], HALF - len(go))
    assert len(lab.etcd.leases()) == 2 * HALF
    for host in ours:
        wait_status(host.daemon, "all peers", lambda seen: seen["peers"]["count"] == 2 * HALF - 1)
        wait_in_order(host, backend)
    for host in go:
        wait_peers(host, backend, ROOMY)
    for host in (*ours, *go):
        host.attach_pods()
    for source in (ours[0], go[0]):
        for target in (ours[1], go[1]):
            assert source.pod.ping(target.pod.address, count=3, interval=0.05).received == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_s1_a_host_of_go_gets_back_the_routes_that_garbage_cost_it(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta, go = lab.add_hosts("alpha", "beta", "gamma")
    for host in (alpha, beta):
        host.start_daemon().wait_ready()
    start_go(go)
    for host in (alpha, beta, go):
        host.attach_pods()
    for host in (alpha, beta):
        wait_in_order(host, backend)
    wait_peers(go, backend)
    pings = start_pings(alpha, beta)
    lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/garbage", "{}")
    wait_for(lambda: peers_of(go, backend), 5, "all its peers to be gone", lambda found: not found)
    lab.etcd.ctl("del", f"{lab.etcd.prefix}/subnets/garbage")
    for host in (alpha, beta):
        wait_in_order(host, backend)
    wait_peers(go, backend, 40)
    assert go.pod.ping(alpha.pod.address, count=3, interval=0.05).received == 3
    assert not pings.stop().lost, "ours never lost a route"
