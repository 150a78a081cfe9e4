"""Data plane and control plane of udp do not wait for one another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from flanneld_py.lab import Transfer, wait_for
from tests.netns.forwarded import forwarded
from tests.netns.observing import wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import config, overlay
from tests.netns.steady_pings import SteadyPings
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Host, Lab

TRANSFER = 20_000_000
"""Bytes."""
STOPPED = 2.0
"""Seconds."""
TTL = 5
MANY = 10_000
PER_TRANSACTION = 128
"""As many as etcd takes."""


def test_packets_flow_while_the_daemon_is_stopped(lab: Lab) -> None:
    alpha, beta = overlay(lab, "udp", "alpha", "beta")
    before = wait_status(alpha.daemon, "a pump", lambda s: s["data_plane"])["data_plane"]
    with SteadyPings(alpha, beta) as out, SteadyPings(beta, alpha) as back:
        alpha.daemon.send_signal(signal.SIGSTOP)
        try:
            assert Transfer(beta.pod, alpha.pod, alpha.pod.address, TRANSFER, STOPPED).finish() == TRANSFER
        finally:
            alpha.daemon.send_signal(signal.SIGCONT)
        for ping in (out, back):
            ping.wait_more()
            assert ping.stop()[0] == 0
    wait_in_order(alpha, "udp")
    assert alpha.daemon.status()["data_plane"] == before, "no pump was replaced for that"


@contextlib.contextmanager
def pumps_hanging(host: Host) -> Iterator[None]:
    """Stop each pump that there is, or is started."""
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.02):
            plane = host.daemon.status().get("data_plane") or {}
            with contextlib.suppress(ProcessLookupError):
                if plane.get("pid"):
                    os.kill(plane["pid"], signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_nothing_of_the_daemon_waits_for_pumps_that_hang(lab: Lab, figure: Callable[[str], None]) -> None:
    lab.etcd.put_config(config("udp"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.start_daemons([f"--subnet-lease-ttl={TTL}s"])
    for host in (alpha, beta):
        wait_in_order(host, "udp")
    kept = lab.etcd.leases()
    slowest = 0.0
    with pumps_hanging(alpha):
        until = time.monotonic() + TTL + 2
        while time.monotonic() < until:
            began = time.monotonic()
            seen = flannelctl(alpha, "status", "--json").json
            slowest = max(slowest, time.monotonic() - began)
            assert seen["lease"]["state"] == "held"
            assert lab.etcd.leases() == kept
    figure(f"udp: flannelctl status took at most {slowest:.2f} s while the pumps hung")
    assert slowest < 2
    gamma = lab.add_host("gamma")
    gamma.start_daemon().wait_ready()
    for host in (alpha, gamma):
        wait_in_order(host, "udp", timeout=40)
    assert alpha.daemon.status()["data_plane"]["restarts"] >= 2


def many_peers(lab: Lab, first: str) -> None:
    """Records of ten thousand hosts, all in a few transactions."""
    lease = lab.etcd.grant(86_400)
    base, public = int(IPv4Address("10.5.0.0")), IPv4Address(first)
    puts = [
        f"put --lease={lease} {lab.etcd.prefix}/subnets/{IPv4Address(base + 16 * number)}-28 "
        + json.dumps(json.dumps({"PublicIP": str(public + number), "PublicIPv6": None}))
        for number in range(MANY)
    ]
    for place in range(0, MANY, PER_TRANSACTION):
        lab.etcd.ctl("txn", text="\n" + "\n".join(puts[place : place + PER_TRANSACTION]) + "\n\n\n")


def test_ten_thousand_peers_come_and_change_and_no_packet_is_lost(lab: Lab) -> None:
    wide = {"Network": "10.4.0.0/14", "SubnetLen": 28, "SubnetMin": "10.4.0.0", "SubnetMax": "10.4.255.0"}
    lab.etcd.put_config(config("udp", **wide))
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.start_daemons()
    for host in (alpha, beta):
        wait_in_order(host, "udp")
    with SteadyPings(alpha, beta) as out, SteadyPings(beta, alpha) as back:
        for first in ("198.18.0.1", "198.19.0.1"):
            many_peers(lab, first)
            last = str(IPv4Network((int(IPv4Address("10.5.0.0")) + 16 * (MANY - 1), 28)))
            for host in (alpha, beta):
                wait_for(
                    partial(forwarded, host, [last]),
                    30,
                    "the last peer",
                    partial(dict.__eq__, {last: str(IPv4Address(first) + MANY - 1)}),
                )
                wait_status(host.daemon, "all peers", lambda s: s["peers"]["count"] == MANY + 1)
        for ping in (out, back):
            ping.wait_more()
            assert ping.stop()[0] == 0
