"""A daemon that meets a thousand leases at its start: few requests, one batch a table, and quick."""

from __future__ import annotations

import time
from ipaddress import ip_address
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pytest

from tests.netns.kernel_writes import STRACE, Write, kernel_writes
from tests.netns.observing import wait_status
from tests.netns.oracle import differences
from tests.netns.peers import Peer, change_peers
from tests.netns.scenes import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host, Lab

COUNT = 1000
NETWORK = "10.64.0.0/12"
UNDERLAY = "198.18.0.1/16"
"""Of all peers (RFC 2544), as the lab's own has room for 254."""
MOST_REQUESTS = 8
ROWS_PER_SEND = 500
TXN_OPS = 125
"""etcd takes 128 in one transaction."""
COMPLETE_WITHIN = 10
"""Seconds, on a machine that does other things as well."""


def peers() -> list[Peer]:
    first_subnet, first_host = ip_address("10.64.0.0"), ip_address("198.18.1.0")
    return [
        Peer(f"{first_subnet + (n << 8)}/24", str(first_host + n), f"02:00:05:00:{n >> 8:02x}:{n & 0xFF:02x}")
        for n in range(1, COUNT + 1)
    ]


def start(host: Host, peers: int, strace: tuple[str, ...] | None = None) -> str:
    """Until all is in order; how long that took."""
    daemon = host.start_daemon(strace=strace)
    ready = daemon.wait_ready()

    def complete(status: dict[str, Any]) -> bool:
        return status["state"] == "in sync" and bool(status["peers"]["count"] == peers)

    wait_status(daemon, f"{peers} peers", complete, COMPLETE_WITHIN)
    seconds = time.monotonic() - daemon.started
    return f"ready {1000 * ready:.0f} ms, complete {1000 * seconds:.0f} ms after exec"


def noun(write: Write) -> str:
    return write.line.split()[1]


@pytest.mark.parametrize(
    ("backend", "tables"), [("host-gw", "nexthop route"), ("vxlan", "fdb neigh nexthop route")]
)
def test_a_thousand_leases(lab: Lab, backend: str, tables: str, figure: Callable[[str], None]) -> None:
    lab.etcd.put_config(config(backend, Network=NETWORK))
    stored = peers()
    for start_at in range(0, COUNT, TXN_OPS):
        change_peers(lab.etcd, backend, put=stored[start_at : start_at + TXN_OPS])
    alpha, beta = lab.add_hosts("alpha", "beta")
    for host in (alpha, beta):
        host.ip("address", "add", UNDERLAY, "dev", "eth0")

    before = lab.etcd.requests()
    took = start(alpha, COUNT)
    requests = lab.etcd.requests() - before
    figure(f"{backend}, cold start with {COUNT} leases: {took}; {requests.total()} etcd requests")
    assert requests.total() <= MOST_REQUESTS
    assert differences(alpha, backend) == []

    start(beta, COUNT + 1, STRACE)
    assert beta.daemon.terminate() == 0
    assert differences(beta, backend) == []
    rows = [write for write in kernel_writes(beta.daemon.trace).writes if noun(write) in tables.split()]
    runs = [(table, list(writes)) for table, writes in groupby(rows, noun)]
    assert [table for table, _ in runs] == tables.split(), "a table at a time, each once"
    for table, writes in runs:
        assert len({write.line for write in writes}) == len(writes) == COUNT + 1, table
        assert len({write.datagram for write in writes}) == -(-len(writes) // ROWS_PER_SEND), table
