"""What others change in the kernel is put right at once, by events, and no more is done than that."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.netns.kernel_writes import STRACE, kernel_writes
from tests.netns.oracle import Rows, actual, differences, expected, subnet_of, wait_in_order
from tests.netns.peers import Peer, change_peers, make_peers
from tests.netns.scenes import BACKENDS, overlay

from flanneld_py.lab import Transfer, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Daemon, Host, Lab

REPAIRED_WITHIN = 2.0
STAYS_BROKEN = 2.5
"""Seconds; more than any repair takes, less than the read-back timer."""
MOST_EVENTS = 3
"""Log lines for one drift: the kernel may cascade while we repair."""
ROOT = Path(__file__).parents[2]


def peer_of(host: Host) -> Peer:
    """A real host as its record shows it."""
    key, record = next((k, r) for k, r in host.etcd.leases().items() if r["PublicIP"] == host.address)
    return Peer(subnet_of(key), host.address, (record.get("BackendData") or {}).get("VtepMAC", ""))


@dataclass(frozen=True, slots=True)
class Drift:
    """Something that another program does to a host: to what concerns one peer, or to all."""

    name: str
    table: str
    """That which the status must count a repair of."""
    breaks: Callable[[Host, str, Peer], None]
    row: str
    """What is then wrong, as the oracle calls it; may hold {subnet}, {gateway}, {base}, {mac}, {own}."""
    leaves: str = ""
    """What the row then contains; empty: it is gone."""

    def symptom(self, host: Host, backend: str, peer: Peer) -> str:
        return self.row.format(**facts(host, backend, peer))

    def is_seen(self, symptom: str, rows: Rows) -> bool:
        return self.leaves in rows.get(symptom, "") if self.leaves else symptom not in rows


def facts(host: Host, backend: str, peer: Peer) -> dict[str, str]:
    return {
        "subnet": peer.subnet,
        "base": peer.base,
        "gateway": peer.base if backend == "vxlan" else peer.public,
        "mac": peer.mac,
        "own": peer_of(host).base,
    }


def run(template: str) -> Callable[[Host, str, Peer], None]:
    """A command line, in the words of `facts`."""

    def breaks(host: Host, backend: str, peer: Peer) -> None:
        host.run(template.format(**facts(host, backend, peer)).split())

    return breaks


def delete_nexthop(host: Host, backend: str, peer: Peer) -> None:
    gateway = facts(host, backend, peer)["gateway"]
    number = next(hop["id"] for hop in host.ip("nexthop", "show") if hop.get("gateway") == gateway)
    host.ip("nexthop", "delete", "id", str(number))


def interface_down(host: Host) -> None:
    host.ip("link", "set", "eth0", "down")


def interface_up(host: Host) -> None:
    """As a network manager does it: what the kernel dropped of the host's own is put back."""
    host.ip_batch(
        [
            "link set eth0 up",
            "route add default via 192.0.2.254 dev eth0",
            f"address replace {host.address6}/64 dev eth0 nodad",
            "route add default via 2001:db8::fe dev eth0",
        ]
    )


def restart_interface(host: Host, _backend: str, _peer: Peer) -> None:
    interface_down(host)
    interface_up(host)


ROUTE, NEXTHOP, NEIGH, FDB = "route {subnet}", "nexthop {gateway}", "neigh {base}", "fdb {mac}"
LINK = "link flannel.1"
BY_ROUTER = "via 192.0.2.254 dev eth0"
OTHER_MAC, LINK_MAC, OTHER_HOST = "02:00:00:00:00:77", "02:00:00:00:00:66", "192.0.2.77"

ROUTES = (
    Drift("route deleted", "routes", run("ip route delete {subnet}"), ROUTE),
    Drift(
        "route replaced", "routes", run(f"ip route replace {{subnet}} {BY_ROUTER} proto static"), ROUTE, BY_ROUTER
    ),
    Drift("nexthop deleted", "nexthops", delete_nexthop, NEXTHOP),
)
ROWS = (
    Drift("neighbour deleted", "neighs", run("ip neigh delete {base} dev flannel.1"), NEIGH),
    Drift(
        "neighbour changed",
        "neighs",
        run(f"ip neigh replace {{base}} lladdr {OTHER_MAC} dev flannel.1 nud permanent"),
        NEIGH,
        OTHER_MAC,
    ),
    Drift("FDB entry deleted", "fdb", run("bridge fdb delete {mac} dev flannel.1"), FDB),
    Drift(
        "FDB entry changed",
        "fdb",
        run(f"bridge fdb replace {{mac}} dev flannel.1 dst {OTHER_HOST}"),
        FDB,
        OTHER_HOST,
    ),
    Drift("address deleted", "addrs", run("ip address delete {own}/32 dev flannel.1"), "address {own}/32"),
)
DEVICE = (
    Drift("MTU changed", "links", run("ip link set flannel.1 mtu 1300"), LINK, "mtu=1300"),
    Drift("MAC changed", "links", run(f"ip link set flannel.1 address {LINK_MAC}"), LINK, f"mac={LINK_MAC}"),
    Drift("link down", "links", run("ip link set flannel.1 down"), LINK, "up=False"),
)
FLUSH = Drift("routes flushed", "routes", run("ip route flush proto 96"), ROUTE)
DELETE_DEVICE = Drift("link deleted", "links", run("ip link delete flannel.1"), LINK)
RESTART_INTERFACE = Drift("eth0 down and up", "routes", restart_interface, ROUTE)

DRIFTS = {
    "host-gw": (ROUTES, (FLUSH,), (RESTART_INTERFACE,)),
    "vxlan": ((*ROUTES, *ROWS), DEVICE, (FLUSH,), (DELETE_DEVICE,)),
}
"""In groups of those that can be seen side by side on one host, each with another peer."""


# --- repairs --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """Two hosts in order, whose daemons the tests of a backend share."""

    backend: str
    alpha: Host
    beta: Host

    def heal(self) -> None:
        """Start over if an earlier test left something broken."""
        if differences(self.alpha, self.backend) or not self.alpha.daemon.running:
            self.alpha.daemon.kill()
            self.alpha.start_daemon().wait_ready()
            wait_in_order(self.alpha, self.backend)


@pytest.fixture(scope="class")
def shared_pair(request: pytest.FixtureRequest, session_lab: Lab) -> Iterator[Pair]:
    session_lab.clear(f"/drift/{request.param}/network")
    yield Pair(request.param, *overlay(session_lab, request.param, "alpha", "beta"))
    session_lab.clear()
    wait_for(session_lab.leftovers, 2, "nothing to be left over", lambda left: not left)


@pytest.fixture(scope="class")
def took() -> Iterator[dict[str, float]]:
    """Test → seconds that a repair took at most; printed in the end."""
    table: dict[str, float] = {}
    yield table
    print("\nrepaired after (at most, in ms):")  # noqa: T201 - for people, with pytest -s
    for name, seconds in table.items():
        print(f"  {name:<30}{1000 * seconds:>6.0f}")  # noqa: T201


CASES = [
    pytest.param(backend, drift, id=f"{backend}-{drift.name.replace(' ', '-')}")
    for backend, groups in DRIFTS.items()
    for drift in itertools.chain(*groups)
]


def repair_events(daemon: Daemon) -> int:
    return sum(line["event"] == "drift_repaired" for line in daemon.log_lines())


def repaired(daemon: Daemon, table: str) -> int:
    counts: dict[str, int] = daemon.status()["drift"]["repaired"]
    return counts.get(table, 0)


@pytest.mark.parametrize(("shared_pair", "drift"), CASES, indirect=["shared_pair"])
class TestRepairs:
    """In a class, so that no other test comes between those that share hosts."""

    def test_is_repaired_by_events(self, shared_pair: Pair, drift: Drift, took: dict[str, float]) -> None:
        backend, alpha, beta = shared_pair.backend, shared_pair.alpha, shared_pair.beta
        shared_pair.heal()
        daemon, target = alpha.daemon, peer_of(beta)
        want = expected(alpha, backend)
        counted, events = repaired(daemon, drift.table), repair_events(daemon)

        drift.breaks(alpha, backend, target)
        broken_at = time.monotonic()
        wait_for(
            lambda: actual(alpha, backend),
            REPAIRED_WITHIN,
            f"repair of: {drift.name}",
            lambda rows: rows == want,
        )
        took[f"{backend}: {drift.name}"] = time.monotonic() - broken_at

        assert alpha.pod.ping(beta.pod.address, count=3).lost == 0
        wait_for(lambda: repaired(daemon, drift.table), 2, "the repair in the status", lambda n: n > counted)
        assert 1 <= repair_events(daemon) - events <= MOST_EVENTS
        assert differences(alpha, backend) == []


def test_is_repaired_soon_after_an_interface_was_down_for_long(lab: Lab) -> None:
    """Longer than the delays between attempts have grown in the meantime."""
    alpha, beta = overlay(lab, "host-gw", "alpha", "beta")
    want = expected(alpha, "host-gw")
    interface_down(alpha)
    time.sleep(3.5)  # attempts at 0, 1 and 3 s; the next one would be at 7 s
    assert actual(alpha, "host-gw") != want
    interface_up(alpha)
    wait_for(lambda: actual(alpha, "host-gw"), REPAIRED_WITHIN, "the routes", lambda rows: rows == want)
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0


# --- without events -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_stays_broken_without_events(lab: Lab, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would prove nothing about events."""
    monkeypatch.setattr("flanneld_py.lab.daemon.COMMAND", (sys.executable, "-m", "tests.netns.deaf_daemon"))
    monkeypatch.chdir(ROOT)
    peers = make_peers(lab.etcd, 8)
    change_peers(lab.etcd, backend, put=peers)
    groups = dict(zip(overlay(lab, backend, *"abcd"[: len(DRIFTS[backend])]), DRIFTS[backend], strict=True))
    symptoms: list[tuple[Host, Drift, str]] = []
    for host, drifts_of_host in groups.items():
        for drift, peer in zip(drifts_of_host, peers, strict=False):
            symptoms.append((host, drift, drift.symptom(host, backend, peer)))
            drift.breaks(host, backend, peer)
    assert len(symptoms) == sum(map(len, DRIFTS[backend]))

    broken = {host: actual(host, backend) for host in groups}
    time.sleep(STAYS_BROKEN)
    for host, drift, symptom in symptoms:
        assert drift.is_seen(symptom, broken[host]), drift.name
    assert {host: actual(host, backend) for host in groups} == broken

    # Told to look, it sees all of it: nothing but the ears was missing.
    for host in groups:
        host.daemon.send_signal(signal.SIGHUP)
    for host in groups:
        wait_in_order(host, backend)


# --- no more than that ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_ordinary_traffic_and_changes_of_others_cause_no_writes(lab: Lab, backend: str) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    alpha.daemon.kill()
    daemon = alpha.start_daemon(strace=STRACE)
    daemon.wait_ready()
    ping = alpha.pod.start_ping(beta.pod.address)
    transfer = Transfer(alpha.pod, beta.pod, beta.pod.address, 20_000_000, seconds=4)
    deadline = time.monotonic() + 5
    for number in itertools.count():
        alpha.ip_batch(
            [
                f"route add 10.99.{number}.0/24 via 192.0.2.254 dev eth0",
                "neigh flush dev cni0",
                "neigh flush dev eth0",
            ]
        )
        if time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    transfer.finish()
    assert ping.stop().lost == ()

    status = daemon.status()
    assert (status["state"], status["drift"]["ops"]) == ("in sync", {"set": 0, "del": 0})
    assert daemon.terminate() == 0
    events = {line["event"] for line in daemon.log_lines()}
    assert events.isdisjoint({"reconciled", "drift_repaired", "apply_failed"})
    trace = kernel_writes(daemon.trace)
    assert trace.reads > 0, "strace saw nothing"
    assert trace.writes == []


FIGHT = 3.0
"""Seconds."""
BURST, PER_SECOND = 10, 5
MOST_CPU = 0.3
"""Of one core."""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_fight_at_line_rate(lab: Lab, backend: str) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    subnet, pid = peer_of(beta).subnet, alpha.daemon.pid
    monitor = alpha.spawn("monitor", ["stdbuf", "-oL", "ip", "-oneline", "monitor", "route"])
    alpha.ip("route", "add", "10.99.0.0/24", "via", "192.0.2.254")
    wait_for(monitor.output, 5, "the monitor to listen", lambda text: "10.99.0.0/24" in text)
    loop = f"while :; do ip route delete {subnet} 2>/dev/null; sleep 0.02; done"
    started, used = time.monotonic(), cpu_seconds(pid)
    other = alpha.spawn("other", ["sh", "-c", loop])
    time.sleep(FIGHT)
    alpha.discard(other)
    lasted = time.monotonic() - started
    cpu = (cpu_seconds(pid) - used) / lasted
    wait_in_order(alpha, backend, 2)
    lines = [line for line in monitor.output().splitlines() if subnet in line]
    writes = sum("Deleted" not in line for line in lines)

    print(f"\n{backend}: {writes} repairs in {lasted:.1f} s of fight, {100 * cpu:.0f} % of a core")  # noqa: T201
    assert BURST < writes <= BURST + PER_SECOND * lasted + 2
    assert cpu < MOST_CPU
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0
