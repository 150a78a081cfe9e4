"""How fast to try again: time is an argument, so tests just pass numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from msgspec import Struct

FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
SHORTEST_PROBE, LONGEST_PROBE = 2.25, 60.0
"""Seconds."""
PROBES_PER_SECOND = 400.0
"""That etcd gets of all hosts together."""


def probe_seconds(hosts: int) -> float:
    """How often each of so many hosts asks etcd for a sign of life: nothing else shows that it is frozen."""
    return min(max(SHORTEST_PROBE, hosts / PROBES_PER_SECOND), LONGEST_PROBE)


class _Trouble(Struct):
    failures: int
    failed_at: float
    not_before: float


class RetrySchedule:
    """When each failed thing may be tried again: after 1, 2, 4 … 60 seconds."""

    def __init__(self) -> None:
        self._troubles: dict[Hashable, _Trouble] = {}

    def __bool__(self) -> bool:
        """Whether anything has failed."""
        return bool(self._troubles)

    def failed(self, key: Hashable, now: float) -> None:
        failures = self._troubles[key].failures + 1 if key in self._troubles else 1
        delay = min(FIRST_DELAY * 2.0 ** min(failures - 1, 16), LONGEST_DELAY)
        self._troubles[key] = _Trouble(failures, now, now + delay)

    def start_over(self) -> None:
        """Circumstances have changed: begin with the first delay again, counted from the last attempt."""
        for trouble in self._troubles.values():
            trouble.failures = 1
            trouble.not_before = min(trouble.not_before, trouble.failed_at + FIRST_DELAY)

    def wait_for(self, key: Hashable, other: Hashable) -> None:
        """Do not try `key` before `other`, which must come first; that is no failure of its own."""
        if key in self._troubles and other in self._troubles:
            self._troubles[key].not_before = self._troubles[other].not_before

    def succeeded(self, key: Hashable) -> None:
        self._troubles.pop(key, None)

    def keep_only(self, keys: Iterable[Hashable]) -> None:
        """Forget what is no longer wanted."""
        wanted = set(keys) if self._troubles else set()
        self._troubles = {key: trouble for key, trouble in self._troubles.items() if key in wanted}

    def due(self, key: Hashable, now: float) -> bool:
        trouble = self._troubles.get(key)
        return trouble is None or trouble.not_before <= now

    def next_due(self) -> float | None:
        return min((trouble.not_before for trouble in self._troubles.values()), default=None)


class TokenBucket:
    """Limits repairs, so that two programs that undo each other's work do not fight at line rate."""

    def __init__(self, burst: int, per_second: float, now: float) -> None:
        self._burst = burst
        self._rate = per_second
        self._tokens = float(burst)
        self._filled_at = now

    def take(self, now: float) -> float:
        """Take a token; the answer is how many seconds to wait first (0 while the burst lasts)."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        self._tokens -= 1
        return max(0.0, -self._tokens / self._rate)


class Backoff:
    """Jittered exponential delays for reconnecting: 0.1 s doubling to `longest`, give or take a half."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def delay(self, random: float) -> float:
        """Seconds before the next attempt; `random` is uniform in [0, 1)."""
        self._failures += 1
        base = min(0.1 * 2.0 ** min(self._failures - 1, 16), self._longest)
        return base * (0.5 + random)
