"""What the bench measures of one daemon among many leases, once."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from flanneld_py.lab.crowd import CONFIG, TXN_OPS, Crowd, Member, members
from flanneld_py.lab.hosts import Host
from flanneld_py.lab.scalesubjects import (
    SAMPLED,
    Running,
    Subject,
    Watched,
    check_rows,
    forget_run,
    prepare,
    start,
    watching_routes,
    watching_tunnel,
)
from flanneld_py.lab.topology import Lab

LONGEST = 300.0
"""Seconds for anything; a quadratic start with ten thousand leases takes a third of it."""
JOIN_REST = 0.03
"""Seconds between joins, so that each one is alone."""
SETTLE = 3.0
"""Seconds after which what a start leaves behind in memory is what stays."""


@dataclass(frozen=True, slots=True)
class Start:
    """From exec on, with a network of the host that was empty."""

    ready: float
    """Seconds to subnet.env, the lease being new."""
    ready_again: float
    """The same after a reboot: the lease stands."""
    complete: float
    """Seconds to the last row, the first time or after the reboot, whichever was less."""
    rss: float
    """MB, some seconds later."""
    cpu: float
    """Processor seconds until then."""
    requests: int
    """Messages that etcd received until then."""


@dataclass(frozen=True, slots=True)
class Joins:
    """With some hosts present: one more, a burst, everybody's renewal, and nothing at all."""

    present: int
    each: tuple[float, ...]
    """Seconds from sending each put to its route, ascending."""
    burst: float
    """Seconds from sending the last put of BURST leases to the last route …"""
    burst_cpu: float
    """… and the processor seconds for it."""
    renewal_cpu: float
    """Processor seconds when all present are written once more with the same value."""
    requests: int
    """That etcd received from the daemon during all of this."""
    idle_cpu: float
    """Processor seconds of a minute in which nothing happens, as its share that was watched tells."""
    rss: float

    @property
    def median(self) -> float:
        return median(self.each)

    @property
    def p99(self) -> float:
        return self.each[len(self.each) * 99 // 100]


@contextmanager
def _bench_host(lab: Lab, backend: str, crowd: Sequence[Member]) -> Iterator[tuple[Host, Crowd]]:
    """A host without daemon, with this crowd in etcd below a prefix of its own."""
    _bench_host.number += 1  # type: ignore[attr-defined]
    lab.etcd.prefix = f"/bench/scale-{_bench_host.number}"  # type: ignore[attr-defined]
    lab.etcd.put_config(json.dumps({**CONFIG, "Backend": {"Type": backend}}))
    host = lab.add_host("scale")
    try:
        prepare(host, backend)
        with Crowd(lab.etcd, backend) as put:
            put.put(crowd)
            yield host, put
    finally:
        lab.remove_host(host)
        lab.etcd.ctl("del", "--prefix", f"{lab.etcd.prefix}/", timeout=60)


_bench_host.number = 0  # type: ignore[attr-defined]


def measure_start(lab: Lab, subject: Subject, backend: str, count: int) -> Start:
    """Start it twice among `count` leases.

    Raises:
        LabError: it ended, or rows are missing.
    """
    crowd = members(count)
    with _bench_host(lab, backend, crowd) as (host, _):
        before = lab.etcd.requests()
        ready, complete, running = _start_once(subject, host, backend, crowd)
        time.sleep(SETTLE)
        rss, cpu = running.rss(), running.cpu()
        requests = _of_daemon(lab.etcd.requests() - before)
        check_rows(host, backend, 0 if backend == "udp" else count)
        if backend == "udp":
            with watching_tunnel(host, crowd) as watched:
                watched.reached(count, LONGEST, running)
        running.end()
        forget_run(host, backend)
        ready_again, complete_again, running = _start_once(subject, host, backend, crowd)
        running.end()
    return Start(ready, ready_again, min(complete, complete_again), rss, cpu, requests)


def _start_once(
    subject: Subject, host: Host, backend: str, crowd: list[Member]
) -> tuple[float, float, Running]:
    """Seconds to subnet.env and to the last row."""
    with _watching(host, backend, crowd) as (watched, count):
        running = start(subject, host)
        ready = running.subnet_file_after(LONGEST)
        last = watched.reached(count, LONGEST, running)
    return ready, last - running.started, running


@contextmanager
def _watching(host: Host, backend: str, crowd: list[Member]) -> Iterator[tuple[Watched, int]]:
    """The watcher, and the number at which all is there."""
    if backend == "udp":
        step = max(1, len(crowd) // SAMPLED)
        sample = list(dict.fromkeys([*crowd[::step], crowd[-1]]))
        with watching_tunnel(host, sample) as watched:
            yield watched, len(sample)
    else:
        with watching_routes(host) as watched:
            yield watched, len(crowd)


def _of_daemon(received: Counter[str]) -> int:
    """Without what etcdctl and the crowd may have sent meanwhile: nothing, by the way this is used."""
    return received.total()


def measure_joins(
    lab: Lab, subject: Subject, backend: str, present: int, *, joins: int, burst: int, idle: float
) -> Joins:
    """Let hosts join one by one and all at once.

    Args:
        lab: where.
        subject: which daemon.
        backend: vxlan or host-gw.
        present: leases at the beginning.
        joins: how many hosts join one by one.
        burst: how many at once.
        idle: seconds to watch it doing nothing.
    """
    with _bench_host(lab, backend, members(present)) as (host, crowd), watching_routes(host) as watched:
        running = start(subject, host)
        watched.reached(present, LONGEST, running)
        time.sleep(SETTLE)
        rss, idle_cpu = running.rss(), _spent(running, lambda: time.sleep(idle)) * 60 / idle
        before, count = lab.etcd.requests(), present
        each = []
        for member in members(joins, present):
            count += 1
            sent = crowd.put([member])
            each.append(watched.reached(count, LONGEST, running, since=sent) - sent)
            time.sleep(JOIN_REST)
        storm = members(burst, present + joins)
        took = [0.0]

        def rush() -> None:
            sent = crowd.put(storm)
            took[0] = watched.reached(count + burst, LONGEST, running) - sent

        burst_cpu = _spent(running, rush)
        renewal_cpu = _spent(running, lambda: _renew(crowd, members(present), running))
        puts = joins + sum(-(-count // TXN_OPS) for count in (burst, present))
        requests = (lab.etcd.requests() - before).total() - puts
        with contextlib.suppress(ProcessLookupError):
            running.end()
    return Joins(
        present, tuple(sorted(each)), max(took[0], 0.0), burst_cpu, renewal_cpu, requests, idle_cpu, rss
    )


def _renew(crowd: Crowd, present: Sequence[Member], running: Running) -> None:
    """Write all of them again, and wait until the daemon is done with that: it uses no processor any more."""
    crowd.put(present)
    last = -1.0
    while (now := running.cpu()) != last:
        last = now
        time.sleep(0.5)


def _spent(running: Running, act: Callable[[], object]) -> float:
    """Processor seconds of the daemon while something happens."""
    before = running.cpu()
    act()
    return running.cpu() - before
