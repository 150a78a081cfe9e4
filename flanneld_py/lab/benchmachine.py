"""How fast the machine is while the bench runs, and what others leave of it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import timeit
from collections.abc import Callable
from pathlib import Path

_QUIET = 0.3
_LOOK = 1.0
_UNNOTICED = 0.05
"""Processors that a virtual machine may lack without its figures showing it."""
_TRIPS = 100


def busy() -> float:
    """Seconds that all processors together have worked since the machine started (proc_stat(5)), 10 ms exact.

    Waiting and what the hypervisor took are no work.
    """
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def others_load() -> float:
    """Processors that are busy while the bench does nothing: what else the machine does."""
    before = busy()
    time.sleep(_QUIET)
    return (busy() - before) / _QUIET


def withheld() -> float:
    """Seconds for which processors had work and the hypervisor let them wait, of all of them together.

    proc_stat(5), steal; 10 ms exact. None on a machine that is not virtual.
    """
    return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def await_quiet(longest: float, say: Callable[[str], None]) -> None:
    """Wait until the hypervisor gives this machine its processors, but no longer than so many seconds."""
    end = time.monotonic() + longest
    told = False
    while time.monotonic() < end:
        before = withheld()
        time.sleep(_LOOK)
        share = (withheld() - before) / _LOOK
        if share <= _UNNOTICED:
            return
        if not told:
            say(f"the hypervisor withholds {share:.2f} processors: waiting, {longest:.0f} s at most")
            told = True


def loop_turn() -> float:
    """How fast the machine is just now: the nanoseconds that Python takes for a turn of a loop that adds."""
    turns = 200_000
    return (
        min(timeit.repeat(f"for n in range({turns}): total += n", "total = 0", repeat=5, number=1))
        / turns
        * 1e9
    )


def wake_trips(rest: float) -> list[float]:
    """Seconds of a byte to a process that sleeps, and back, each after a rest; ascending.

    What an event passes on its way into the kernel are a handful of threads and processes that sleep.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(["cat"], stdin=theirs.fileno(), stdout=theirs.fileno()) as echo:
        trips = []
        for _ in range(_TRIPS):
            time.sleep(rest)
            began = time.perf_counter()
            ours.send(b"x")
            ours.recv(1)
            trips.append(time.perf_counter() - began)
        ours.shutdown(socket.SHUT_WR)
        echo.wait()
    return sorted(trips)
