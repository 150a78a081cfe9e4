"""What the service manager is told: that all threads turn, and that a start may take longer."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.observing import events
from tests.netns.scenes import config

if TYPE_CHECKING:
    from flanneld_py.lab import Daemon, Lab

TWICE_A_SECOND = {"WATCHDOG_USEC": "400000"}
ESSENTIAL = {"main", "lease-keeper", "host-watch", "filter-watch", "reconciler", "publisher", "control"}
"""Threads, besides the one whose waiting for etcd shows only after minutes that it hangs."""
SIGNS = 5
"""Of life: more than come by chance."""


def signs(daemon: Daemon, field: str = "WATCHDOG") -> list[float]:
    """When the manager was told it."""
    return [told.at for told in daemon.notifications if field in told.fields]


def wait_signs(daemon: Daemon, field: str = "WATCHDOG") -> None:
    known = len(signs(daemon, field))
    wait_for(lambda: signs(daemon, field), 10, f"{field} again", lambda all_: len(all_) >= known + SIGNS)


def test_a_start_that_waits_asks_for_more_time_and_a_daemon_that_is_ready_does_not(lab: Lab) -> None:
    lab.etcd.stop()
    daemon = lab.add_host("alpha").start_daemon(env=TWICE_A_SECOND)
    wait_signs(daemon, "EXTEND_TIMEOUT_USEC")
    lab.etcd.start()
    lab.etcd.put_config(config("vxlan"))
    daemon.wait_ready()
    wait_signs(daemon)
    (ready,) = signs(daemon, "READY")
    late = [at for at in signs(daemon, "EXTEND_TIMEOUT_USEC") if at > ready + 0.1]
    assert late == []


@pytest.mark.parametrize("threads", [{"reconciler"}, {"main"}, ESSENTIAL], ids=["reconciler", "main", "all"])
def test_a_thread_that_hangs_ends_the_signs_of_life(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, threads: set[str]
) -> None:
    monkeypatch.setattr(
        "flanneld_py.lab.daemon.COMMAND", (sys.executable, "-m", "tests.netns.hanging_daemon")
    )
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    daemon = alpha.start_daemon(env=TWICE_A_SECOND)
    daemon.wait_ready()
    wait_signs(daemon)
    assert events(daemon, "thread_hangs") == []
    alpha.subnet_file.with_name("hang").write_text(" ".join(threads))
    daemon.send_signal(signal.SIGHUP)
    wait_for(lambda: named(daemon), 10, "the threads that hang to be named", lambda told: told == threads)
    last = signs(daemon)
    wait_for(time.monotonic, 5, "several times the interval", lambda now: now > last[-1] + 1)
    assert signs(daemon) == last


def named(daemon: Daemon) -> set[str]:
    """The threads that are said to hang."""
    told = events(daemon, "thread_hangs")
    return set(told[-1]["threads"]) if told else set()


def test_a_reload_says_that_it_is_over(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    daemon = lab.add_host("alpha").start_daemon()
    daemon.wait_ready()
    daemon.send_signal(signal.SIGHUP)
    wait_for(lambda: len(signs(daemon, "READY")), 5, "READY again", lambda count: count == 2)
    (reloading,) = (told for told in daemon.notifications if "RELOADING" in told.fields)
    assert abs(int(reloading.fields["MONOTONIC_USEC"]) / 1e6 - reloading.at) < 1


def test_a_daemon_that_was_stopped_for_a_while_goes_on(lab: Lab) -> None:
    """After SIGCONT, sigtimedwait of CPython 3.11 tells of a signal that never came."""
    lab.etcd.put_config(config("vxlan"))
    daemon = lab.add_host("alpha").start_daemon(env=TWICE_A_SECOND)
    daemon.wait_ready()
    for _ in range(3):
        wait_signs(daemon)
        daemon.send_signal(signal.SIGSTOP)
        wait_until(time.monotonic() + 0.5)
        daemon.send_signal(signal.SIGCONT)
    wait_signs(daemon)
    assert daemon.running
    assert events(daemon, "thread_hangs") == []


def wait_until(end: float) -> None:
    wait_for(lambda: time.monotonic() > end, 5, "longer than the interval")
