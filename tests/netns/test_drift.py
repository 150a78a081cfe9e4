"""What others change in the kernel is put right at once, by events."""

from __future__ import annotations

import itertools
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from flanneld_py.lab import wait_for
from tests.netns.faults.surfaces import OBSERVED
from tests.netns.oracle import Rows, actual, differences, expected, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.scenes import BACKENDS, NETWORK, overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Daemon, Host, Lab
    from tests.netns.faults.rows import Matrix, Row

REPAIRED = "put right at once"
REPAIRED_WITHIN = 2.0
STAYS_BROKEN = 2.5
"""Seconds; more than any repair takes, less than the read-back timer."""
MOST_EVENTS = 3
"""Log lines for one drift: the kernel may cascade while we repair."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Drift:
    """Something that another program does to a host: to what concerns one peer, or to all.

    Script and row may hold the names of `facts` in braces.
    """

    name: str
    table: str
    """That which the status must count a repair of."""
    script: str
    """For a shell."""
    row: str
    """What is then wrong, as the oracle calls it."""
    leaves: str = ""
    """What the row then contains; empty: it is gone."""

    def is_seen(self, row: str, rows: Rows) -> bool:
        return self.leaves in rows.get(row, "") if self.leaves else row not in rows


def facts(host: Host, backend: str, peer: Peer) -> dict[str, str]:
    gateway = peer.base if backend == "vxlan" else peer.public
    ids = [str(hop["id"]) for hop in host.ip("nexthop", "show") if hop.get("gateway") == gateway]
    return {
        "subnet": peer.subnet,
        "base": peer.base,
        "mac": peer.mac,
        "gateway": gateway,
        "nexthop": "".join(ids),
        "own": peer_of(host).base,
        "address6": host.address6,
    }


def peer_of(host: Host) -> Peer:
    """A real host as its record shows it."""
    key, record = next((k, r) for k, r in host.etcd.leases().items() if r["PublicIP"] == host.address)
    return Peer(subnet_of(key), host.address, (record.get("BackendData") or {}).get("VtepMAC", ""))


INTERFACE_UP = (
    # As a network manager does it: what the kernel dropped of the host's own is put back.
    "ip link set eth0 up; ip route add default via 192.0.2.254 dev eth0; "
    "ip address replace {address6}/64 dev eth0 nodad; ip route add default via 2001:db8::fe dev eth0"
)
# The kernel shows a gateway beside the id of a nexthop, and refuses a delete that names both.
FLUSH_ROUTES = (
    "sysctl -qw net.ipv4.nexthop_compat_mode=0; ip route flush proto 96; "
    "sysctl -qw net.ipv4.nexthop_compat_mode=1"
)
RENAME = (
    "ip link set flannel.1 name lost0 2>/dev/null || "
    # Before Linux 6.2 it must be down for that.
    "printf 'link set %s\\n' 'flannel.1 down' 'flannel.1 name lost0' 'lost0 up' | ip -batch -"
)
ROUTE, NEXTHOP, NEIGH, FDB = "route {subnet}", "nexthop {gateway}", "neigh {base}", "fdb {mac}"
LINK = "link flannel.1"
BY_ROUTER = "via 192.0.2.254 dev eth0"
OTHER_MAC, LINK_MAC, OTHER_HOST = "02:00:00:00:00:77", "02:00:00:00:00:66", "192.0.2.77"

ROUTES = (
    Drift("route deleted", "routes", "ip route delete {subnet}", ROUTE),
    Drift(
        "route replaced", "routes", f"ip route replace {{subnet}} {BY_ROUTER} proto static", ROUTE, BY_ROUTER
    ),
    Drift("nexthop deleted", "nexthops", "ip nexthop delete id {nexthop}", NEXTHOP),
    Drift(
        "nexthop replaced",
        "nexthops",
        "sysctl -qw net.ipv4.nexthop_compat_mode=0; "
        "ip nexthop replace id {nexthop} via 192.0.2.253 dev eth0; "
        "sysctl -qw net.ipv4.nexthop_compat_mode=1",
        NEXTHOP,
    ),
)
ROWS = (
    Drift("neighbour deleted", "neighs", "ip neigh delete {base} dev flannel.1", NEIGH),
    Drift(
        "neighbour changed",
        "neighs",
        f"ip neigh replace {{base}} lladdr {OTHER_MAC} dev flannel.1 nud permanent",
        NEIGH,
        OTHER_MAC,
    ),
    Drift("neighbour failed", "neighs", "ip neigh replace {base} dev flannel.1 nud failed", NEIGH),
    Drift("neighbour incomplete", "neighs", "ip neigh replace {base} dev flannel.1 nud incomplete", NEIGH),
    Drift("FDB entry deleted", "fdb", "bridge fdb delete {mac} dev flannel.1", FDB),
    Drift(
        "FDB entry changed",
        "fdb",
        f"bridge fdb replace {{mac}} dev flannel.1 dst {OTHER_HOST}",
        FDB,
        OTHER_HOST,
    ),
    *(
        Drift(
            f"FDB entry {kind}",
            "fdb",
            f"bridge fdb replace {{mac}} dev flannel.1 dst {OTHER_HOST} self {kind}",
            FDB,
            OTHER_HOST,
        )
        for kind in ("dynamic", "static")
    ),
)
DEVICE = (
    Drift("address deleted", "addrs", "ip address delete {own}/32 dev flannel.1", "address {own}/32"),
    Drift(
        "address added",
        "addrs",
        "ip address add 10.5.255.255/32 dev flannel.1",
        "address 10.5.255.255/32",
        "flannel.1",
    ),
    Drift("MTU changed", "links", "ip link set flannel.1 mtu 1300", LINK, "mtu=1300"),
    Drift("MAC changed", "links", f"ip link set flannel.1 address {LINK_MAC}", LINK, f"mac={LINK_MAC}"),
    Drift("link down", "links", "ip link set flannel.1 down", LINK, "up=False"),
)
FLUSHED = (Drift("routes flushed", "routes", FLUSH_ROUTES, ROUTE),)
NEIGHS_FLUSHED = (Drift("neighbours flushed", "neighs", "ip neigh flush dev flannel.1 nud permanent", NEIGH),)
HOPS_FLUSHED = (Drift("nexthops flushed", "nexthops", "ip nexthop flush proto 2", NEXTHOP),)
RENAMED = (Drift("link renamed", "links", RENAME, LINK),)
DELETED = (Drift("link deleted", "links", "ip link delete flannel.1", LINK),)
RESTARTED = (Drift("eth0 down and up", "routes", f"ip link set eth0 down; {INTERFACE_UP}", ROUTE),)

TUN_LINK, NETWORK_ROUTE = "link flannel0", "route 10.5.0.0/16"
TUN_ROUTE = (Drift("route deleted", "routes", "ip route delete 10.5.0.0/16", NETWORK_ROUTE),)
TUN_ROUTE_REPLACED = (
    Drift(
        "route replaced",
        "routes",
        f"ip route replace 10.5.0.0/16 {BY_ROUTER} proto static",
        NETWORK_ROUTE,
        BY_ROUTER,
    ),
)
TUN_DEVICE = (
    Drift("address deleted", "addrs", "ip address delete {own}/32 dev flannel0", "address {own}/32"),
    Drift(
        "address added",
        "addrs",
        "ip address add 10.5.255.255/32 dev flannel0",
        "address 10.5.255.255/32",
        "flannel0",
    ),
    Drift("MTU changed", "links", "ip link set flannel0 mtu 1300", TUN_LINK, "mtu=1300"),
    Drift("queue changed", "links", "ip link set flannel0 txqueuelen 1", TUN_LINK, "queue=1"),
    Drift("mark changed", "links", "ip link set flannel0 alias foo", TUN_LINK, "alias=foo"),
    Drift("link down", "links", "ip link set flannel0 down", TUN_LINK, "up=False"),
)
TUN_FLUSHED = (Drift("routes flushed", "routes", "ip route flush proto 96", NETWORK_ROUTE),)
TUN_RENAMED = (Drift("link renamed", "links", RENAME.replace("flannel.1", "flannel0"), TUN_LINK),)
TUN_DELETED = (Drift("link deleted", "links", "ip link delete flannel0", TUN_LINK),)

DRIFTS: dict[str, tuple[tuple[Drift, ...], ...]] = {
    "host-gw": (ROUTES, FLUSHED, HOPS_FLUSHED, RESTARTED),
    "udp": (TUN_ROUTE, TUN_ROUTE_REPLACED, TUN_DEVICE, TUN_FLUSHED, TUN_RENAMED, TUN_DELETED),
    "vxlan": ((*ROUTES, *ROWS), DEVICE, FLUSHED, NEIGHS_FLUSHED, HOPS_FLUSHED, RENAMED, DELETED),
}
"""In groups of those that can be seen side by side on one host, each done to another peer."""


# --- repairs --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """Two hosts in order, which the tests of a class share."""

    backend: str
    alpha: Host
    beta: Host

    def heal(self) -> None:
        """Start over if an earlier test left something broken."""
        if not self.alpha.daemon.running or differences(self.alpha, self.backend):
            self.alpha.daemon.kill()
            self.alpha.start_daemon(OBSERVED).wait_ready()
            wait_in_order(self.alpha, self.backend)

    def check_repair(self, drift: Drift, row: Row) -> float:
        """Break something and see it mended; how long that took at most, in seconds."""
        alpha, daemon = self.alpha, self.alpha.daemon
        words = facts(alpha, self.backend, peer_of(self.beta))
        want = expected(alpha, self.backend)
        counted, events = repaired(daemon, drift.table), repair_events(daemon)

        started = time.monotonic()
        alpha.run(["sh", "-ec", drift.script.format(**words)])
        wait_for(
            lambda: actual(alpha, self.backend),
            REPAIRED_WITHIN,
            f"repair of: {drift.name}",
            lambda rows: rows == want,
        )
        took = time.monotonic() - started

        assert alpha.pod.ping(self.beta.pod.address, count=3).lost == 0
        wait_for(lambda: repaired(daemon, drift.table), 2, "the repair in the status", lambda n: n > counted)
        assert 1 <= repair_events(daemon) - events <= MOST_EVENTS
        row.repaired(alpha, drift.table)
        row.took(took)
        return took


def wait_calm(host: Host) -> None:
    """Wait until eth0's IPv6 addresses have settled: what is heard of them would make the deaf look."""
    wait_for(
        lambda: host.ip("-6", "address", "show", "dev", "eth0", "tentative"),
        5,
        "duplicate address detection to end",
        lambda found: not any(link.get("addr_info") for link in found),
        0.05,
    )


def repair_events(daemon: Daemon) -> int:
    return sum(line["event"] == "drift_repaired" for line in daemon.log_lines())


def repaired(daemon: Daemon, table: str) -> int:
    counts: dict[str, int] = daemon.status()["drift"]["repaired"]
    return counts.get(table, 0)


@pytest.fixture(scope="class")
def shared_pair(request: pytest.FixtureRequest, session_lab: Lab) -> Iterator[Pair]:
    """For the backend that the class names."""
    backend: str = request.cls.backend
    session_lab.clear(f"/drift/{backend}/network")
    pair = Pair(backend, *overlay(session_lab, backend, "alpha", "beta", flags=OBSERVED))
    wait_calm(pair.alpha)
    yield pair
    session_lab.clear()
    wait_for(session_lab.leftovers, 2, "nothing to be left over", lambda left: not left)


@pytest.fixture(scope="class")
def took(request: pytest.FixtureRequest, figure: Callable[[str], None]) -> Iterator[dict[str, float]]:
    """Drift → seconds until it was repaired; printed in the end."""
    table: dict[str, float] = {}
    yield table
    figure(f"{request.cls.backend}: from a command's start to its repair seen, in ms")
    for name, seconds in table.items():
        figure(f"  {name:<24}{1000 * seconds:>5.0f}")


def rows_of(backend: str) -> pytest.MarkDecorator:
    drifts = list(itertools.chain(*DRIFTS[backend]))
    return pytest.mark.parametrize("drift", drifts, ids=[drift.name.replace(" ", "-") for drift in drifts])


class TestHostGw:
    """A class of its own, so that no other test comes between those that share hosts."""

    backend: ClassVar[str] = "host-gw"

    @rows_of("host-gw")
    def test_is_repaired_by_events(
        self, shared_pair: Pair, drift: Drift, took: dict[str, float], fault: Matrix
    ) -> None:
        shared_pair.heal()
        with fault(f"drift: {drift.name}", self.backend, expected=REPAIRED, check=None) as row:
            took[drift.name] = shared_pair.check_repair(drift, row)


class TestVxlan:
    """As TestHostGw."""

    backend: ClassVar[str] = "vxlan"

    @rows_of("vxlan")
    def test_is_repaired_by_events(
        self, shared_pair: Pair, drift: Drift, took: dict[str, float], fault: Matrix
    ) -> None:
        shared_pair.heal()
        with fault(f"drift: {drift.name}", self.backend, expected=REPAIRED, check=None) as row:
            took[drift.name] = shared_pair.check_repair(drift, row)


def test_an_interface_that_was_down_for_long_is_used_again_at_once(lab: Lab) -> None:
    """Attempts have become rare in the meantime: they are made at 0, 1, and 3 s, the next would be at 7 s."""
    alpha, beta = overlay(lab, "host-gw", "alpha", "beta")
    want = expected(alpha, "host-gw")
    alpha.ip("link", "set", "eth0", "down")
    time.sleep(3.5)
    assert actual(alpha, "host-gw") != want
    alpha.run(["sh", "-ec", INTERFACE_UP.format(address6=alpha.address6)])
    wait_for(lambda: actual(alpha, "host-gw"), REPAIRED_WITHIN, "the routes", lambda rows: rows == want)
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0


def test_a_device_whose_mark_was_changed_is_marked_again(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")

    def alias() -> str:
        found: str = alpha.ip("link", "show", "dev", "flannel.1")[0].get("ifalias", "")
        return found

    ours = alias()
    alpha.ip("link", "set", "flannel.1", "alias", "foo")
    wait_for(alias, REPAIRED_WITHIN, "the mark", lambda text: text == ours)
    wait_for(lambda: repaired(alpha.daemon, "links"), 2, "the repair in the status", lambda n: n == 1)
    assert alpha.daemon.status()["drift"]["ops"]["del"] == 0


class TestUdp:
    """As TestHostGw."""

    backend: ClassVar[str] = "udp"

    @rows_of("udp")
    def test_is_repaired_by_events(
        self, shared_pair: Pair, drift: Drift, took: dict[str, float], fault: Matrix
    ) -> None:
        shared_pair.heal()
        with fault(f"drift: {drift.name}", self.backend, expected=REPAIRED, check=None) as row:
            took[drift.name] = shared_pair.check_repair(drift, row)


# --- routes of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_foreign_route_is_reported_and_left_alone(lab: Lab, backend: str) -> None:
    alpha, _ = overlay(lab, backend, "alpha", "beta")
    (peer,) = make_peers(lab.etcd, 1)
    destination = NETWORK if backend == "udp" else peer.subnet
    foreign = [destination, "via", "192.0.2.253", "dev", "eth0", "proto", "static"]
    said = f"a route to {' '.join(foreign)} is not ours"

    def failed() -> list[str]:
        return [row["error"] for row in alpha.daemon.status()["drift"]["failed"]]

    def theirs() -> list[str]:
        routes = alpha.ip("route", "show", destination)
        return [route["gateway"] for route in routes if route["protocol"] == "static"]

    if backend == "udp":  # its one route stands already
        alpha.daemon.kill()
        alpha.ip("route", "delete", destination)
    alpha.ip("route", "add", *foreign)
    change_peers(lab.etcd, backend, put=[peer])
    if backend == "udp":
        alpha.start_daemon().wait_ready()
    wait_for(failed, 5, "the conflict in the status", lambda errors: len(errors) == 1 and said in errors[0])
    assert alpha.daemon.status()["state"] == "degraded"
    alpha.daemon.kill()
    alpha.start_daemon().wait_ready()
    wait_for(failed, 5, "the same after a restart", lambda errors: len(errors) == 1 and said in errors[0])
    assert theirs() == ["192.0.2.253"]
    alpha.ip("route", "delete", *foreign)
    wait_in_order(alpha, backend, REPAIRED_WITHIN)

    # Set before ours, it would carry the traffic.
    alpha.ip("route", "prepend", *foreign)
    wait_for(failed, REPAIRED_WITHIN, "the conflict", lambda errors: len(errors) == 1 and said in errors[0])
    assert theirs() == ["192.0.2.253"]
    alpha.ip("route", "delete", *foreign)
    wait_for(failed, REPAIRED_WITHIN, "the conflict to end", lambda errors: not errors)
    wait_in_order(alpha, backend)


# --- without events -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_stays_broken_without_events(lab: Lab, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would prove nothing about events."""
    monkeypatch.setattr("flanneld_py.lab.daemon.COMMAND", (sys.executable, "-m", "tests.netns.deaf_daemon"))
    monkeypatch.chdir(ROOT)
    peers = make_peers(lab.etcd, max(map(len, DRIFTS[backend])))
    change_peers(lab.etcd, backend, put=peers)
    groups = DRIFTS[backend]
    hosts = overlay(lab, backend, *(f"host{n}" for n in range(len(groups))))
    done: list[tuple[Host, Drift, str]] = []
    for host, drifts in zip(hosts, groups, strict=True):
        for drift, peer in zip(drifts, peers, strict=False):
            words = facts(host, backend, peer)
            host.run(["sh", "-ec", drift.script.format(**words)])
            done.append((host, drift, drift.row.format(**words)))
    assert len(done) == sum(map(len, groups))

    broken = {host: actual(host, backend) for host in hosts}
    for host, drift, row in done:
        assert drift.is_seen(row, broken[host]), drift.name
    time.sleep(STAYS_BROKEN)
    assert {host: actual(host, backend) for host in hosts} == broken

    # Told to look, it sees all of it: nothing but the ears was missing.
    for host in hosts:
        host.daemon.send_signal(signal.SIGHUP)
    for host in hosts:
        wait_in_order(host, backend)
