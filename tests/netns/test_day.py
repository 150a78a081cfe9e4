"""A day in minutes: a daemon among peers that come and go, while etcd and the host have their troubles.

From the second hour on it must be as it was: as many threads, descriptors and etcd leases, as much memory.
`make day` takes six minutes for it, every other run of the tests one and a half.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from operator import eq, le
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from flanneld_py.lab.etcd import http_get
from tests.netns.observing import wait_status
from tests.netns.oracle import wait_in_order
from tests.netns.peers import LIFETIME, Peer
from tests.netns.registry_history import revision
from tests.netns.scenes import config
from tests.netns.test_ctl import flannelctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanneld_py.lab import Daemon, EtcdServer, Host, Lab

HOURS = 24
WARM = 2
"""Hours after which nothing may grow."""
SHORT_HOUR, FULL_HOUR = 2.5, 12.5
"""Seconds."""
SETTLED_WITHIN = 20.0
AS_BEFORE_WITHIN = 10.0
MOST_LOG_LINES = 200
MOST_GROWTH = 2048
"""KiB."""
MOVED = 3
"""Peers that come, and as many that go, each hour; more at once would be taken for a wiped registry."""
HEALTH_PORT, METRICS_PORT = 9470, 9471


@dataclass(frozen=True, slots=True)
class Sample:
    """What a daemon takes."""

    threads: int
    descriptors: int
    etcd_leases: int
    memory: int = field(compare=False)
    """KiB that are resident."""
    log_lines: int = field(compare=False)
    """Until now."""

    @property
    def shown(self) -> str:
        return (
            f"{self.threads} threads, {self.descriptors} descriptors, {self.etcd_leases} etcd leases, "
            f"{self.memory} KiB, {self.log_lines} log lines"
        )

    @classmethod
    def of(cls, daemon: Daemon, etcd: EtcdServer, seconds: float = 0.5) -> Sample:
        """What it takes most of this time: a listing, say, needs a thread for some milliseconds."""
        proc = Path(f"/proc/{daemon.pid}")
        seen: list[tuple[int, int]] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            seen.append((len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))))
            time.sleep(0.01)
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
        threads, descriptors = mode(seen)
        return cls(
            threads,
            descriptors,
            etcd_leases=len(etcd.ctl("lease", "list").splitlines()[1:]),
            memory=int(status["VmRSS"].split()[0]),
            log_lines=len(daemon.log_text().splitlines()),
        )


class Town:
    """Peers that exist in etcd only: groups of them, each with an etcd lease of its own."""

    def __init__(self, etcd: EtcdServer) -> None:
        self._etcd = etcd
        self._numbers = count()
        self._groups: list[tuple[str, list[Peer]]] = []
        for _ in range(4):
            self.join()

    @property
    def newest(self) -> Peer:
        return self._groups[-1][1][-1]

    def join(self) -> None:
        lease = self._etcd.grant(LIFETIME)
        group = [self._peer(next(self._numbers)) for _ in range(MOVED)]
        self._groups.append((lease, group))
        self._put(lease, group)

    def leave(self) -> None:
        lease, _ = self._groups.pop(0)
        self._etcd.ctl("lease", "revoke", lease)

    def renew(self) -> None:
        """As Go flannel does it: the same record once more. One of them has moved to another address."""
        lease, group = self._groups[-1]
        first = group[0]
        group[0] = Peer(first.subnet, first.public.replace("192.0.2.1", "192.0.2.2"), first.mac)
        self._put(lease, group)

    def _put(self, lease: str, group: list[Peer]) -> None:
        puts = (
            f"put --lease={lease} {self._etcd.prefix}/subnets/{peer.key} "
            f"{json.dumps(json.dumps(peer.record('vxlan'), separators=(',', ':')))}"
            for peer in group
        )
        self._etcd.ctl("txn", text="\n" + "\n".join(puts) + "\n\n\n")

    @staticmethod
    def _peer(number: int) -> Peer:
        return Peer(
            f"10.5.{1 + number % 90}.0/24",
            f"192.0.2.{100 + number % 50}",
            f"02:00:05:00:01:{number % 250:02x}",
        )


class Day:
    """What happens in which hour."""

    def __init__(self, lab: Lab, alpha: Host, beta: Host, flags: list[str]) -> None:
        self._lab, self._etcd, self._alpha, self._beta = lab, lab.etcd, alpha, beta
        self._flags = flags
        self._town = Town(lab.etcd)

    def pass_hour(self, hour: int) -> None:
        self._town.join()
        self._town.renew()
        self._town.leave()
        self._visit()
        for every, at, happen in self._troubles():
            if hour == 1 or hour % every == at:  # all of it once, as the first time takes memory
                happen()

    def _troubles(self) -> Iterator[tuple[int, int, Callable[[], None]]]:
        yield 3, 0, self._shrink_and_grow
        yield 3, 1, self._second_address
        yield 3, 2, self._lost_neighbour
        yield 4, 1, self._etcd_restarts
        yield 4, 3, self._etcd_freezes
        yield 5, 2, self._compaction
        yield 6, 4, self._beta_restarts
        yield 6, 0, self._garbage

    def _visit(self) -> None:
        """Those who look at it: an operator, a load balancer, a Prometheus."""
        assert flannelctl(self._alpha, "status", "--json").code in (0, 1)
        http_get(self._alpha, "127.0.0.1", HEALTH_PORT, "/healthz")
        http_get(self._alpha, "127.0.0.1", METRICS_PORT, "/metrics")

    def _shrink_and_grow(self) -> None:
        for mtu in (1400, 1500):
            self._alpha.ip("link", "set", "eth0", "mtu", str(mtu))
            wait_for(self._overlay_mtu, SETTLED_WITHIN, f"{mtu} less 50", partial(eq, mtu - 50))

    def _overlay_mtu(self) -> int:
        (link,) = self._alpha.ip("link", "show", "flannel.1")
        mtu: int = link["mtu"]
        return mtu

    def _second_address(self) -> None:
        for verb in ("add", "delete"):
            self._alpha.ip("address", verb, "198.51.100.1/24", "dev", "eth0")

    def _lost_neighbour(self) -> None:
        wait_in_order(self._alpha, "vxlan", SETTLED_WITHIN)
        self._alpha.ip("neigh", "delete", self._town.newest.base, "dev", "flannel.1")

    def _etcd_restarts(self) -> None:
        self._etcd.stop()
        self._missed()
        self._etcd.start()

    def _etcd_freezes(self) -> None:
        self._etcd.pause()
        self._missed()
        self._etcd.resume()

    def _missed(self) -> None:
        for host in (self._alpha, self._beta):
            wait_status(
                host.daemon,
                "etcd to be missed",
                lambda s: s["registry"]["state"] != "in sync",
                SETTLED_WITHIN,
            )

    def _compaction(self) -> None:
        self._etcd.ctl("compact", str(revision(self._etcd)))

    def _beta_restarts(self) -> None:
        assert self._beta.daemon.terminate() == 0
        self._beta.start_daemon(self._flags).wait_ready()

    def _garbage(self) -> None:
        key = f"{self._etcd.prefix}/subnets/10.5.99.0-24"
        self._etcd.ctl("put", key, "no JSON")
        wait_status(
            self._alpha.daemon, "it to be told", lambda s: s["peers"]["bad_count"] == 1, SETTLED_WITHIN
        )
        self._etcd.ctl("del", key)


def settle(lab: Lab) -> None:
    """Wait until all is well."""
    for host in lab.hosts:
        wait_in_order(host, "vxlan", SETTLED_WITHIN)
        wait_status(
            host.daemon, "no problem", lambda s: s["state"] == "in sync" and not s["problems"], SETTLED_WITHIN
        )


@pytest.fixture
def tell(request: pytest.FixtureRequest, is_full: bool) -> Callable[[str], None]:
    """Shows a line at once to whoever waits for `make day`."""
    plugins = request.config.pluginmanager
    capture, reporter = plugins.getplugin("capturemanager"), plugins.getplugin("terminalreporter")

    def shown(line: str) -> None:
        if is_full and capture is not None and reporter is not None:
            with capture.global_and_fixture_disabled():
                reporter.ensure_newline()
                reporter.write_line(line)

    return shown


@pytest.mark.timeout(1200)
def test_a_day_leaves_nothing_behind(
    lab: Lab,
    is_full: bool,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    hour_takes = FULL_HOUR if is_full else SHORT_HOUR
    faster = 3600 / hour_takes
    monkeypatch.setattr("flanneld_py.lab.daemon.COMMAND", (sys.executable, "-m", "tests.netns.fast_daemon"))
    monkeypatch.setenv("FASTER", str(faster))
    flags = [
        f"--subnet-lease-ttl={round(86_400 / faster)}s",
        f"--registry-wipe-grace={max(1, round(60 / faster))}s",
        f"--healthz-port={HEALTH_PORT}",
        f"--metrics-addr=127.0.0.1:{METRICS_PORT}",
    ]
    lab.etcd.put_config(config("vxlan"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    lab.start_daemons(flags)
    day = Day(lab, alpha, beta, flags)
    samples: list[Sample] = []
    for hour in range(1, HOURS + 1):
        ends = time.monotonic() + hour_takes
        day.pass_hour(hour)
        wait_for(time.monotonic, hour_takes + 1, "the hour to pass", partial(le, ends))
        settle(lab)
        if hour <= WARM:
            samples = [Sample.of(alpha.daemon, lab.etcd, hour_takes)]
        else:
            # Connections of visitors, and of before etcd was started again, end a moment later.
            samples.append(
                wait_for(
                    partial(Sample.of, alpha.daemon, lab.etcd),
                    AS_BEFORE_WITHIN,
                    f"as much as in hour {WARM}: {samples[0]}",
                    partial(eq, samples[0]),
                )
            )
        print(f"hour {hour}: {samples[-1]}")  # noqa: T201 - shown with a failure
        tell(f"hour {hour} of {HOURS}: {samples[-1].shown}")

    lines = [later.log_lines - sooner.log_lines for sooner, later in pairwise(samples)]
    first, most = samples[0], max(sample.memory for sample in samples)
    figure(
        f"a day of {HOURS} h in {HOURS * hour_takes:.0f} s, from hour {WARM} on: {first.threads} threads, "
        f"{first.descriptors} descriptors, {first.etcd_leases} etcd leases; memory {first.memory} KiB then, "
        f"{samples[-1].memory} KiB at the end, {most} KiB at most; at most {max(lines)} log lines an hour"
    )
    assert most - first.memory <= MOST_GROWTH, [sample.memory for sample in samples]
    assert max(lines) <= MOST_LOG_LINES, lines
