"""What happens is counted as it happens, whether or not anybody asks for metrics."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec import Struct, field

Labels: TypeAlias = tuple[str, ...]
Counted: TypeAlias = Literal[
    "lease_renewals", "lease_conflicts", "registry_resyncs", "events", "reconcile_failures"
]
Timed: TypeAlias = Literal["registry_request", "reconcile"]
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: the upper ends of what durations are sorted into."""


class Durations(Struct):
    """How often something took how long."""

    within: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    """For each of BOUNDS how many took as long, but longer than the bound before; last, all longer ones."""
    seconds: float = 0.0


class Counts:
    """Counters and durations since the start, by name and values of labels. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[tuple[Counted, Labels]] = Counter()
        self._durations: dict[tuple[Timed, Labels], Durations] = {}
        self._synced = 0.0

    def add(self, name: Counted, *labels: str, by: int = 1) -> None:
        with self._lock:
            self._counters[name, labels] += by

    def took(self, name: Timed, seconds: float, *labels: str) -> None:
        with self._lock:
            durations = self._durations.setdefault((name, labels), Durations())
            durations.within[bisect_left(BOUNDS, seconds)] += 1
            durations.seconds += seconds

    def synced(self) -> None:
        """Something came from the registry just now, or it proved to hold nothing new."""
        self._synced = time.time()

    @property
    def last_sync(self) -> float | None:
        """Seconds of Unix time; None: never."""
        return self._synced or None

    def counted(self, name: Counted) -> Mapping[Labels, int]:
        with self._lock:
            return {labels: count for (one, labels), count in self._counters.items() if one == name}

    def timed(self, name: Timed) -> Mapping[Labels, Durations]:
        with self._lock:
            return {
                labels: Durations(list(one.within), one.seconds)
                for (timed, labels), one in self._durations.items()
                if timed == name
            }
