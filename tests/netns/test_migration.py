"""From Go flannel to flanneld-py host by host, and back, as docs/migration.md has it."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.go_hosts import start_go, wait_peers
from tests.netns.observing import ENOUGH_ANSWERS, wait_answers, wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import IN_KERNEL, config

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab


def own(host: Host) -> tuple[str, dict[str, Any]]:
    """Key and record of a host."""
    return next((key, r) for key, r in host.etcd.leases().items() if r["PublicIP"] == host.address)


@pytest.mark.parametrize("backend", IN_KERNEL)
def test_there_and_back_with_every_subnet_kept_and_no_packet_lost(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    hosts = lab.add_hosts("alpha", "beta", "gamma")
    nodes = [start_go(host) for host in hosts]
    for host in hosts:
        host.attach_pods()
        wait_peers(host, backend)
    before = {host.name: own(host) for host in hosts}
    environment = {host.name: host.subnet_env() for host in hosts}
    runs = [a.pod.start_ping(b.pod.address) for a in hosts for b in hosts if a is not b]
    for run in runs:
        wait_answers(run)

    for host, node in zip(hosts, nodes, strict=True):
        node.terminate()
        host.start_daemon().wait_ready()
        wait_in_order(host, backend)
        for peer in hosts:
            wait_peers(peer, backend)
    for host in hosts:
        key, record = own(host)
        assert (key, {**record, "NodeID": None}) == (
            before[host.name][0],
            {**before[host.name][1], "NodeID": None},
        )
        assert record["NodeID"] == host.node_id
        assert host.subnet_env() == environment[host.name]
        wait_status(
            host.daemon, "all peers", lambda seen: seen["peers"]["count"] == 2 and not seen["problems"]
        )

    for host in hosts:
        host.daemon.terminate()
        start_go(host)
        for peer in hosts:
            wait_peers(peer, backend)
    assert {host.name: own(host) for host in hosts} == before, "as Go flannel had written it"
    for run in runs:
        wait_for(run.sent, 10, "more pings", partial(int.__le__, run.sent() + ENOUGH_ANSWERS))
        loss = run.stop()
        assert not loss.lost, f"{len(loss.lost)} of {loss.sent}"


@pytest.mark.parametrize("backend", IN_KERNEL)
def test_cleanup_before_the_way_back_leaves_go_flannel_a_clean_host(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta = lab.add_hosts("alpha", "beta")
    start_go(alpha)
    beta.start_daemon().wait_ready()
    key = own(beta)[0]
    beta.daemon.terminate()
    flags = [flag for flag in beta.flags if not flag.startswith(("--node-id", "--iface"))]
    beta.run([sys.executable, "-m", "flanneld_py.cli.ctl.main", *flags, "cleanup"])
    start_go(beta)
    assert own(beta)[0] == key, "found by its address"
    for host in (alpha, beta):
        host.attach_pods()
        wait_peers(host, backend)
    wait_for(lambda: alpha.pod.ping(beta.pod.address, count=1).received, 5, "an answer", bool)
