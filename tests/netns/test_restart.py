"""A daemon killed and started again: nobody notices, and only what has changed is written."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import Transfer, wait_for
from tests.netns.kernel_writes import STRACE, Trace, kernel_writes
from tests.netns.observing import wait_in_sync
from tests.netns.oracle import differences, own_key, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.registry_history import nothing_written, revision
from tests.netns.scenes import BACKENDS, overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Daemon, Host, Lab

PINGS = 1000
"""Spread over 5 s, which a restart must fit into."""


def stop_and_read_trace(daemon: Daemon) -> Trace:
    assert daemon.terminate() == 0
    trace = kernel_writes(daemon.trace)
    assert trace.reads > 0, "strace saw nothing"
    return trace


@dataclass(frozen=True, slots=True)
class Foreign:
    """What another program has set up on the host, right beside what is ours."""

    host: Host

    def __post_init__(self) -> None:
        self.host.ip_batch(
            [
                "route add 10.77.0.0/24 via 192.0.2.254 dev eth0 proto static",
                "route add 10.5.254.0/24 via 192.0.2.254 dev eth0 proto static",
                "route add 10.5.255.0/24 via 192.0.2.254 dev eth0 proto boot",
                "nexthop add id 77 via 192.0.2.254 dev eth0 proto static",
                "route add 10.78.0.0/24 nhid 77 proto 97",
                "link add vxlan77 address 02:00:77:00:00:01 type vxlan id 77 dstport 4789 local "
                f"{self.host.address} dev eth0 nolearning",
                "address add 10.77.1.0/32 dev vxlan77",
                "link set vxlan77 up",
                "neigh add 10.77.2.0 lladdr 02:00:77:00:00:02 dev vxlan77 nud permanent",
                "neigh add 10.5.253.0 lladdr 02:00:77:00:00:03 dev vxlan77 nud permanent",
                "route add 10.77.2.0/24 via 10.77.2.0 dev vxlan77 onlink",
            ]
        )
        for mac in ("02:00:77:00:00:02", "02:00:77:00:00:03"):
            self.host.run(["bridge", "fdb", "append", mac, "dev", "vxlan77", "dst", "192.0.2.254"])

    def text(self) -> str:
        """All of it, as iproute2 prints it."""
        shown = (
            "ip -details link show dev vxlan77",
            "ip address show dev vxlan77",
            "ip neigh show dev vxlan77",
            "bridge fdb show dev vxlan77",
            "ip route show dev vxlan77",
            "ip route show proto static",
            "ip route show proto boot",
            "ip route show proto 97",
            "ip nexthop show id 77",
        )
        return "".join(self.host.run(command.split()) for command in shown)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_nothing_changed_nothing_is_written_and_nothing_lost(lab: Lab, backend: str) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    foreign = Foreign(alpha)
    before, stored, env = foreign.text(), revision(lab.etcd), alpha.subnet_file.read_bytes()
    ping = alpha.pod.start_ping(beta.pod.address)
    wait_for(ping.answered, 5, "the first answers", lambda count: count >= 100)

    alpha.daemon.kill()
    daemon = alpha.start_daemon(strace=STRACE)
    wait_in_sync(daemon)
    wait_for(ping.sent, 15, f"{PINGS} pings", lambda count: count >= PINGS)
    loss = ping.stop()

    assert loss.sent >= PINGS
    assert loss.lost == ()
    assert daemon.status()["drift"]["ops"] == {"set": 0, "del": 0}
    assert nothing_written(lab.etcd, stored)
    assert stop_and_read_trace(daemon).writes == []
    assert foreign.text() == before
    assert alpha.subnet_file.read_bytes() == env


# --- again and again ------------------------------------------------------------------------------

RESTARTS = 20
INTERVAL = 0.005
"""Seconds from ping to ping."""
MOST_LOST = {"host-gw": 0.0, "vxlan": 0.0, "udp": 0.050}
"""Seconds of a restart in which pings are lost; of udp with a keeper."""
MARK = "198.51.100.9"
"""A route by which a monitor is known to be there."""
FLOW = 1 << 20
"""Bytes of a TCP connection that lasts as long as a restart."""


@contextmanager
def told_by_the_kernel(host: Host) -> Iterator[list[str]]:
    """Fills the list when the block ends: what the kernel announced of links, addresses and routes.

    Of neighbours and FDB entries only those of overlay devices; the others come and go with traffic.
    """
    told: list[str] = []
    monitors = [
        host.spawn("monitor", ["ip", "-o", "monitor", "link", "address", "route", "nexthop"]),
        host.spawn("monitor", ["ip", "-o", "monitor", "neigh"]),
        host.spawn("monitor", ["bridge", "-o", "monitor", "fdb"]),
    ]
    probe = ["ip", "route", "replace", MARK, "dev", "lo"]
    wait_for(lambda: host.run(probe) + monitors[0].output(), 10, "a monitor", lambda text: MARK in text)
    before = len(monitors[0].output().splitlines())
    try:
        yield told
    finally:
        host.run(["ip", "route", "del", MARK])
        wait_for(monitors[0].output, 5, "the last line", lambda text: f"Deleted {MARK}" in text)
        lines = monitors[0].output().splitlines()[before:]
        # The pods' devices are the lab's, and may settle a little later.
        told += [line for line in lines if MARK not in line and f": {host.pod_port}" not in line]
        told += [line for m in monitors[1:] for line in m.output().splitlines() if "flannel" in line]
        for monitor in monitors:
            host.discard(monitor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_restarts_with_nothing_changed(lab: Lab, backend: str, figure: Callable[[str], None]) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    stored, own = revision(lab.etcd), own_key(alpha)
    slowest = 0.0
    with told_by_the_kernel(alpha) as told:
        ping = alpha.pod.start_ping(beta.pod.address)
        wait_for(ping.answered, 5, "the first answers", lambda count: count >= 100)
        for n in range(RESTARTS):
            flow = Transfer(beta.pod, alpha.pod, alpha.pod.address, FLOW, seconds=2)
            if n % 2:
                alpha.daemon.kill()
            else:
                assert alpha.daemon.terminate() == 0
            daemon = alpha.start_daemon()
            slowest = max(slowest, daemon.wait_ready())
            wait_in_sync(daemon)
            assert daemon.status()["drift"]["ops"] == {"set": 0, "del": 0}, f"restart {n}"
            assert flow.finish() == FLOW
        loss = ping.stop()
    lost = len(loss.lost) * INTERVAL / RESTARTS
    figure(
        f"{backend}: {len(loss.lost)} of {loss.sent} pings lost over {RESTARTS} restarts, "
        f"{lost * 1000:.0f} ms each; READY after {slowest:.1f} s at most"
    )
    assert told == [], "written to the kernel"
    assert nothing_written(lab.etcd, stored), "written to etcd"
    assert own_key(alpha) == own
    assert lost <= MOST_LOST[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_hosts_are_restarted_at_once_and_etcd_has_nothing_to_tell(lab: Lab, backend: str) -> None:
    names = ("alpha", "beta", "gamma", "delta", "epsilon")
    hosts = overlay(lab, backend, *names)
    leases, stored = lab.etcd.leases(), revision(lab.etcd)
    for host in hosts:
        host.daemon.kill()
    for host in hosts:
        host.start_daemon()
    for host in hosts:
        host.daemon.wait_ready(60)
        wait_in_order(host, backend)
        assert host.daemon.status()["drift"]["ops"] == {"set": 0, "del": 0}
    assert nothing_written(lab.etcd, stored)
    assert lab.etcd.leases() == leases


@dataclass(frozen=True, slots=True)
class Upheaval:
    """What happens in etcd while the daemon is dead."""

    backend: str
    steady: list[Peer]
    gone: list[Peer]
    moved: Peer
    """As it was; then it has another MAC or, where there are none, another address."""
    joined: list[Peer]

    @property
    def moved_to(self) -> Peer:
        if self.backend == "vxlan":
            return replace(self.moved, mac="02:00:05:00:00:99")
        return replace(self.moved, public="192.0.2.199")

    def expected_writes(self, nexthops: dict[str, int]) -> Counter[str]:
        """`nexthops`: gateway → id, as it was before."""
        lines: list[str] = []
        if self.backend == "udp":
            return Counter()  # all of them are behind one route
        for peer in self.gone:
            lines += [f"del route {peer.subnet}", f"del nexthop {nexthops[self.gateway(peer)]}"]
        for peer in self.joined:
            lines += [f"set route {peer.subnet}", f"set nexthop {self.gateway(peer)}"]
        if self.backend == "vxlan":
            for verb, peers in (("set", (*self.joined, self.moved_to)), ("del", self.gone)):
                for peer in peers:
                    lines += [f"{verb} neigh {peer.base}", f"{verb} fdb {peer.mac}"]
            lines.append(f"del fdb {self.moved.mac}")
        else:
            lines += [f"set nexthop {self.moved_to.public}", f"set route {self.moved.subnet}"]
            lines.append(f"del nexthop {nexthops[self.moved.public]}")
        return Counter(lines)

    def gateway(self, peer: Peer) -> str:
        return peer.base if self.backend == "vxlan" else peer.public


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_peers_changed_only_their_rows_are_written(lab: Lab, backend: str) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    peers = make_peers(lab.etcd, 8)
    upheaval = Upheaval(backend, peers[:2], peers[2:5], peers[5], peers[6:])
    change_peers(lab.etcd, backend, put=peers[:6])
    wait_in_order(alpha, backend)
    foreign = Foreign(alpha)
    before, foreign_rows, own = foreign.text(), differences(alpha, backend), own_key(alpha)
    nexthops = {hop["gateway"]: hop["id"] for hop in alpha.ip("nexthop", "show")}
    # The two rows that the joined have, that of whom moved, and those of the gone.
    pump_ops = {"set": 3, "del": 3} if backend == "udp" else {"set": 0, "del": 0}
    ping = alpha.pod.start_ping(beta.pod.address)
    wait_for(ping.answered, 5, "the first answers", lambda count: count >= 20)

    alpha.daemon.kill()
    change_peers(lab.etcd, backend, put=[upheaval.moved_to, *upheaval.joined], gone=upheaval.gone)
    assert differences(alpha, backend) != foreign_rows
    daemon = alpha.start_daemon(strace=STRACE)
    wait_in_sync(daemon)
    loss = ping.stop()

    assert differences(alpha, backend) == foreign_rows
    assert loss.lost == ()
    expected = upheaval.expected_writes(nexthops)
    ops = pump_ops
    for line, count in expected.items():
        ops[line.split()[0]] += count
    assert daemon.status()["drift"]["ops"] == ops
    assert Counter(stop_and_read_trace(daemon).lines) == expected
    assert foreign.text() == before
    assert own_key(alpha) == own


def test_the_count_of_kernel_writes_misses_none(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    commands = {
        "ip address add 10.9.0.1/32 dev lo": "set address 10.9.0.1/32",
        "ip route add 10.9.1.0/24 via 192.0.2.254": "set route 10.9.1.0/24",
        "ip route show": None,
        "ip -6 route add 2001:db8:9::/48 via 2001:db8::fe": "set route 2001:db8:9::/48",
        "ip route delete 10.9.1.0/24": "del route 10.9.1.0/24",
        "ip route delete 10.9.2.0/24 2>/dev/null": "del route 10.9.2.0/24",  # there is none
        "ip neigh add 192.0.2.77 lladdr 02:00:00:00:00:77 dev eth0": "set neigh 192.0.2.77",
        "ip nexthop add id 7 via 192.0.2.254 dev eth0": "set nexthop 192.0.2.254",
        "ip nexthop delete id 7": "del nexthop 7",
        "ip nexthop show": None,
        "bridge link show": None,
        "nft list ruleset": None,
        "nft add table ip t": "set packet filter",
        "iptables-legacy -P FORWARD ACCEPT": "setsockopt IPT_SO_SET_REPLACE",
        "iptables-legacy -S": None,
        "echo 0 >/proc/sys/net/ipv4/conf/all/log_martians": "open /proc/sys/net/ipv4/conf/all/log_martians",
        "cat /proc/sys/net/ipv4/ip_forward": None,
    }
    path = alpha.directory / "commands.strace"
    alpha.run(["strace", "-f", "-o", str(path), *STRACE, "--", "sh", "-c", "; ".join(commands)])
    trace = kernel_writes(path)
    assert trace.lines == [line for line in commands.values() if line]
    assert len({write.datagram for write in trace.writes}) == len(trace.writes)
    assert trace.reads >= 2
