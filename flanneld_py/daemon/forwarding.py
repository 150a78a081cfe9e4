"""Whether the host forwards what containers send and get. No event tells of a change in /proc/sys."""

from __future__ import annotations

import threading

import structlog

from flanneld_py.daemon.inbox import Inbox, Levels, Problem
from flanneld_py.drivers.forwarding import SYSCTLS, is_forwarding

LEASES_ONLY = "alloc"
"""The backend that carries nothing."""


class ForwardingWatch:
    """Offers `forwarding_problem`; to put it right is left to the operator. Any thread may call."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._lock = threading.Lock()
        self._log = structlog.get_logger().bind(part="host")

    def look(self) -> None:
        """Read the settings once."""
        with self._lock:
            problem = find_off(self._inbox.levels)
            if problem == self._inbox.levels.forwarding_problem:
                return
            self._inbox.offer(forwarding_problem=problem)
            if problem is not None:
                self._log.warning("forwarding_off", reason=problem.reason, fix=problem.fix)


def find_off(levels: Levels) -> Problem | None:
    """What the network's families need and the kernel does not do."""
    network = levels.network_in_force
    if network is None or network.backend.type == LEASES_ONLY:
        return None
    off = [SYSCTLS[family] for family in network.config.families if is_forwarding(family) is False]
    if not off:
        return None
    return Problem(
        "forwarding-off",
        f"{' and '.join(off)} {'is' if len(off) == 1 else 'are'} 0: "
        "this host forwards nothing between its containers and other hosts",
        f"sysctl -w {' '.join(f'{name}=1' for name in off)}, and the same in /etc/sysctl.d for the next boot",
    )
