"""As long as nothing happens, nothing is done: no write to kernel, etcd or disk, no word in the log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.netns.faults.product import on_vxlan
from tests.netns.faults.surfaces import OBSERVED, Surfaces
from tests.netns.kernel_writes import STRACE, kernel_writes
from tests.netns.observing import wait_status
from tests.netns.oracle import actual, wait_in_order
from tests.netns.registry_history import nothing_written, revision
from tests.netns.scenes import overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flanneld_py.lab import Host, Lab

SHORT, FULL = 60.0, 600.0
"""Seconds to watch, the second with --full."""
LISTENING = {"Watch/Watch", "Lease/LeaseKeepAlive"}
"""All that etcd may hear: questions whether it is there, and renewals."""
EVERY = 5.0
"""Seconds between two looks at all surfaces."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one host, all that must stay."""

    rows: Mapping[str, str]
    checks: Mapping[str, Any]
    drift: Mapping[str, Any]
    lease: Mapping[str, Any]
    log: int
    """Lines."""
    status_written: int
    env_written: int
    """When these files were, in nanoseconds."""
    kernel_writes: tuple[str, ...]

    @classmethod
    def of(cls, host: Host, backend: str) -> Self:
        status = host.daemon.status()
        return cls(
            actual(host, backend),
            status["checks"],
            status["drift"],
            status["lease"],
            len(host.daemon.log_lines()),
            host.status_file.stat().st_mtime_ns,
            host.subnet_file.stat().st_mtime_ns,
            tuple(kernel_writes(host.daemon.trace).lines),
        )


@pytest.mark.fault
@pytest.mark.timeout(FULL + 120)
@on_vxlan
def test_nothing_changes_while_nothing_happens(
    lab: Lab, backend: str, is_full: bool, figure: Callable[[str], None]
) -> None:
    alpha, beta = hosts = overlay(lab, backend, "alpha", "beta")
    for host in hosts:
        host.daemon.kill()
        host.start_daemon(OBSERVED, strace=STRACE).wait_ready()
        wait_in_order(host, backend)
        wait_status(host.daemon, "to be well", lambda s: (s["state"], s["problems"]) == ("in sync", []))
    ping = alpha.pod.start_ping(beta.pod.address, interval=0.1)
    time.sleep(EVERY)  # what the start has left to do
    before = [Seen.of(host, backend) for host in hosts]
    stored, asked, begun = revision(lab.etcd), lab.etcd.requests(), time.monotonic()

    while time.monotonic() < begun + (FULL if is_full else SHORT):
        time.sleep(EVERY)
        for host in hosts:
            surfaces = Surfaces.of(host)
            assert [*surfaces.contradictions(), *surfaces.troubles()] == []
    heard, lasted = lab.etcd.requests() - asked, time.monotonic() - begun

    assert [Seen.of(host, backend) for host in hosts] == before
    assert nothing_written(lab.etcd, stored)
    assert heard.keys() <= (LISTENING | {"KV/Range"} if is_full else LISTENING), heard
    assert heard["KV/Range"] <= len(hosts), "each lists everything again once in ten minutes"
    assert ping.stop().lost == ()
    figure(f"{backend}: nothing changed in {lasted:.0f} s; etcd heard {dict(heard)} of {len(hosts)} hosts")
