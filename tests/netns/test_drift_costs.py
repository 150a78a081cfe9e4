"""What others do in the kernel costs a daemon little: no writes for nothing, and no fight at line rate."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import Transfer, wait_for
from tests.netns.kernel_writes import STRACE, kernel_writes
from tests.netns.observing import cpu_seconds
from tests.netns.oracle import wait_in_order
from tests.netns.scenes import BACKENDS, NETWORK, overlay
from tests.netns.test_drift import peer_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flanneld_py.lab import Lab


@pytest.mark.parametrize("backend", BACKENDS)
def test_ordinary_traffic_and_changes_of_others_cause_no_writes(lab: Lab, backend: str) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    alpha.daemon.kill()
    daemon = alpha.start_daemon(strace=STRACE)
    daemon.wait_ready()
    ping = alpha.pod.start_ping(beta.pod.address)
    # The pump is traced as well, and every byte that it writes.
    size = 1_000_000 if backend == "udp" else 20_000_000
    transfer = Transfer(alpha.pod, beta.pod, beta.pod.address, size, seconds=4)
    deadline = time.monotonic() + 5
    for number in itertools.count():
        other = f"10.99.{number}.0/24 via 192.0.2.254 dev eth0"
        alpha.ip_batch(
            [
                f"route add {other}",
                "neigh flush dev cni0",
                f"neigh replace 192.0.2.9 dev eth0 lladdr 02:00:00:00:00:{number:02x}",
            ]
        )
        if time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    transfer.finish()
    assert ping.stop().sent > 500

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
BURST, PER_SECOND = 10, 10
"""Repairs at once, and then."""
MOST_CPU = 0.3
"""Of one core."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_fight_at_line_rate(lab: Lab, backend: str, figure: Callable[[str], None]) -> None:
    alpha, beta = overlay(lab, backend, "alpha", "beta")
    subnet, pid = NETWORK if backend == "udp" else peer_of(beta).subnet, alpha.daemon.pid
    monitor = alpha.spawn("monitor", ["stdbuf", "-oL", "ip", "-oneline", "monitor", "route"])

    def heard() -> str:
        alpha.ip_batch([f"route {verb} 10.99.0.0/24 via 192.0.2.254" for verb in ("add", "delete")])
        return monitor.output()

    wait_for(heard, 5, "the monitor to listen", lambda text: "10.99.0.0/24" in text)
    loop = f"while :; do ip route delete {subnet} 2>/dev/null; sleep 0.015; done"
    started, used = time.monotonic(), cpu_seconds(pid)
    other = alpha.spawn("other", ["sh", "-c", loop])
    time.sleep(FIGHT)
    alpha.discard(other)
    lasted = time.monotonic() - started
    cpu = (cpu_seconds(pid) - used) / lasted
    wait_in_order(alpha, backend, 2)
    lines = [line for line in monitor.output().splitlines() if subnet in line]
    writes = sum("Deleted" not in line for line in lines)

    figure(
        f"{backend}: {writes} repairs in {lasted:.1f} s of fight over a route, {100 * cpu:.0f} % of a core"
    )
    assert BURST < writes <= BURST + PER_SECOND * lasted + 2
    assert cpu < MOST_CPU
    assert alpha.pod.ping(beta.pod.address, count=3).lost == 0


def test_a_device_changed_at_line_rate_costs_little(
    lab: Lab, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    pid = alpha.daemon.pid
    batch = tmp_path / "batch"
    batch.write_text("link set flannel.1 mtu 1300\nlink set flannel.1 mtu 1301\n" * 1000)
    loop = f"while :; do ip -batch {batch}; done"
    started, used = time.monotonic(), cpu_seconds(pid)
    other = alpha.spawn("other", ["sh", "-c", loop])
    time.sleep(FIGHT)
    alpha.discard(other)
    cpu = (cpu_seconds(pid) - used) / (time.monotonic() - started)
    wait_in_order(alpha, "vxlan")
    figure(f"vxlan: {100 * cpu:.0f} % of a core while another program changes the MTU at line rate")
    assert cpu < MOST_CPU
