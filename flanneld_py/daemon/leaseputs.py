"""When our record is written again for Go flannel's sake (core/renewal.py), followed over a daemon's life."""

from __future__ import annotations

import time
from random import Random

from msgspec.structs import replace

from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.renewal import Puts, has_go_hosts, heal_in, is_contested, next_put
from flanneld_py.daemon.inbox import boottime
from flanneld_py.model import OwnLease, Snapshot


class PutSchedule:
    """Of one thread. `at` is the boottime of the next put, None: none."""

    def __init__(self, policy: LeasePolicy, rng: Random, due: float) -> None:
        """`due`: when the last run would have written, in seconds since 1970; 0: not at all."""
        self._policy = policy
        self._rng = rng
        self._owed = due
        self._puts: Puts | None = None
        self._spread = rng.random()
        self._seen: tuple[Snapshot, OwnLease] | None = None
        self._hosts = 0
        self.at: float | None = None
        self.due = 0.0
        """The same for the next run, as far as it comes from the time gone by; 0: not at all."""

    def look(self, snapshot: Snapshot, own: OwnLease) -> None:
        """Bring the time up to date with the registry, in which our record stands."""
        if self._seen is not None and self._seen[0] is snapshot and self._seen[1] is own:
            return
        self._seen, self._hosts = (snapshot, own), len(snapshot.records)
        if not has_go_hosts(snapshot, own.record.backend_type):
            self._puts, self.at, self.due = None, None, 0.0
            return
        if self._puts is None:
            self._begin(Puts(since=self._first_since(own)), own)
        # What is unreadable since before our last write has been made up for by that.
        news = snapshot.unreadable > own.record.mod_revision
        if news and self._puts is not None and self._puts.unreadable_since is None:
            self._puts = replace(self._puts, unreadable_since=boottime())
        self.at = None if is_contested(own.record, snapshot) else self._next(own)

    def written(self, own: OwnLease) -> None:
        """Our record has just been put, or would have been had nobody changed it."""
        now, puts = boottime(), self._puts
        if puts is not None:
            self._spread = self._rng.random()
            self._begin(Puts(now, healed=puts.healed if puts.unreadable_since is None else now), own)
            self.at = self._next(own)

    def _begin(self, puts: Puts, own: OwnLease) -> None:
        self._puts = puts
        self.due = round(time.time() + self._next(own) - boottime(), 3)

    def _next(self, own: OwnLease) -> float:
        assert self._puts is not None  # noqa: S101 - for the type checker
        return next_put(self._puts, self._policy, own.ttl, self._spread, self._hosts)

    def _first_since(self, own: OwnLease) -> float:
        """Now, or so long ago that what the last run owed falls due when it would have."""
        now = boottime()
        if not self._owed:
            return now
        left = self._owed - time.time()
        if left <= 0:
            left = heal_in(self._spread, self._hosts)
        self._owed = 0.0
        period = next_put(Puts(now), self._policy, own.ttl, self._spread) - now
        return min(now, now + left - period)
