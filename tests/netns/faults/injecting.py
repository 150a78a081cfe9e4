"""Faults of single system calls in a daemon that runs, for as long as a block lasts."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flanneld_py.lab import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.lab import Daemon

NETLINK_SENDS, NETLINK_RECEIVES = "sendto", "recvfrom"
"""The calls by which it speaks with the kernel; gRPC uses others."""


@contextmanager
def failing(daemon: Daemon, *injections: str) -> Iterator[None]:
    """Such as `fsync:error=ENOSPC` or `sendto:error=EPERM:when=1`; see strace(1), --inject."""
    calls = ",".join(injection.partition(":")[0] for injection in injections)
    inject = [f"--inject={injection}" for injection in injections]
    argv = ["strace", "-f", "-p", str(daemon.pid), f"--trace={calls}", *inject]
    tracer = daemon.host.workspace.spawn("strace", [*argv, "-o", "/dev/null"])
    try:
        wait_for(tracer.output, 10, "strace to attach", lambda text: "attached" in text)
        yield
    finally:
        # In order: a call that it has begun to spoil it brings to its end, and lets go of the daemon.
        tracer.terminate()
        daemon.host.workspace.discard(tracer)


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """What happens meanwhile it finds all at once."""
    daemon.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.send_signal(signal.SIGCONT)
