"""From Go flannel to flanneld-py host by host, and back, as docs/migration.md has it."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.netns.go_hosts import start_go, wait_peers
from tests.netns.observing import ENOUGH_ANSWERS, start_pings, wait_answers, wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import BACKENDS, IN_KERNEL, config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


def test_with_udp_only_packets_of_the_host_in_between_are_lost(
    lab: Lab, figure: Callable[[str], None]
) -> None:
    """Flannel's TUN goes with it; ours would stay without a reader, so cleanup precedes the way back."""
    lab.etcd.put_config(config("udp"))
    hosts = lab.add_hosts("alpha", "beta", "gamma")
    nodes = [start_go(host) for host in hosts]
    for host in hosts:
        host.attach_pods()
        wait_peers(host, "udp")
    before = {host.name: own(host) for host in hosts}

    def there(host: Host) -> None:
        nodes[hosts.index(host)].terminate()
        host.start_daemon().wait_ready()
        wait_in_order(host, "udp")

    def back(host: Host) -> None:
        host.daemon.terminate()
        cleanup(host)
        start_go(host)
        wait_peers(host, "udp")

    for change in (there, back):
        gaps = [change_under_pings(hosts, host, change) for host in hosts]
        longest = max(gaps) * 1000
        figure(f"udp: {longest:.0f} ms at most without an answer on the way {change.__name__}, host by host")
        for host in hosts:
            key, record = own(host)
            record.pop("NodeID", None)
            assert (key, record) == before[host.name]


def change_under_pings(hosts: Sequence[Host], host: Host, change: Callable[[Host], None]) -> float:
    """Change one of three hosts, which the others do not notice; seconds for which it did not answer."""
    others = [other for other in hosts if other is not host]
    between, through = start_pings(*others), start_pings(others[0], host)
    change(host)
    for ping in (between, through):
        wait_answers(ping)
    for other in others:
        wait_peers(other, "udp")
    assert between.stop().lost == ()
    return through.stop().longest_gap


def cleanup(host: Host) -> None:
    flags = [flag for flag in host.flags if not flag.startswith(("--node-id", "--iface"))]
    host.run([sys.executable, "-m", "flanneld_py.cli.ctl.main", *flags, "cleanup"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_cleanup_before_the_way_back_leaves_go_flannel_a_clean_host(lab: Lab, backend: str) -> None:
    lab.etcd.put_config(config(backend))
    alpha, beta = lab.add_hosts("alpha", "beta")
    start_go(alpha)
    beta.start_daemon().wait_ready()
    key = own(beta)[0]
    beta.daemon.terminate()
    cleanup(beta)
    start_go(beta)
    assert own(beta)[0] == key, "found by its address"
    for host in (alpha, beta):
        host.attach_pods()
        wait_peers(host, backend)
    wait_for(lambda: alpha.pod.ping(beta.pod.address, count=1).received, 5, "an answer", bool)
