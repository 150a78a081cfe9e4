"""Whether the threads still turn: for the health server, and for systemd's watchdog."""

from __future__ import annotations

import time
from collections.abc import Mapping

BEAT_EVERY = 5.0
"""Seconds: a thread that only waits shows this often that it does."""
LIMITS = {
    # It waits for signals, and is sent one for the purpose.
    "main": 60.0,
    # A watch is silent for up to 76 s before it counts as dead, and a listing takes its time as well.
    "registry-watch": 120.0,
    # Some calls in a row, each of which tries all endpoints of etcd.
    "lease-keeper": 120.0,
    "host-watch": 60.0,
    "filter-watch": 60.0,
    "reconciler": 60.0,
    "publisher": 60.0,
    "control": 60.0,
}
"""Thread → seconds between two beats. Not registry-memory: it may wait for a disk that hangs, which delays
nobody and which no restart cures."""


class Heartbeats:
    """When each thread last showed that it turns. Any thread may call.

    By time.monotonic(), as a host that sleeps is no hanging thread.
    """

    def __init__(self, limits: Mapping[str, float] = LIMITS) -> None:
        self._limits = limits
        self._last: dict[str, float] = {}

    def beat(self, name: str) -> None:
        """Thread `name` turns. From the first time on it must go on to; names without a limit are ignored."""
        if name in self._limits:
            self._last[name] = time.monotonic()

    def late(self, now: float) -> list[str]:
        """Names of the threads that did not beat in time; `now` by time.monotonic()."""
        return [name for name, last in sorted(self._last.copy().items()) if now - last > self._limits[name]]
