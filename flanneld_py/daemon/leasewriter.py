"""What the lease-keeper writes into the registry: guarded, not too often, and believed when it is shown."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import structlog

from flanneld_py.core.leasedecision import Adopt, Claim, Move, Release, Restore, Write
from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.pace import TokenBucket
from flanneld_py.core.records import SUBNETS_PREFIX, decode, encode
from flanneld_py.core.renewal import renew_interval
from flanneld_py.daemon.inbox import LeaseState, Problem, boottime
from flanneld_py.daemon.leaseground import Awaited, Ground
from flanneld_py.drivers.etcd import EtcdRegistry
from flanneld_py.errors import LeaseGone, RecordError, RegistryError
from flanneld_py.model import Entry, Record, Snapshot

WRITE_BURST, WRITES_PER_SECOND = 5, 0.1
"""Somebody who undoes what we write must not make us write for ever."""
AWAIT_AT_MOST = 2.0
"""Seconds until a decision is made again although the snapshot does not show our write yet."""


class LeaseWriter:
    """Of one thread. Every method that writes raises RegistryError when nobody knows what became of it."""

    def __init__(self, registry: EtcdRegistry, policy: LeasePolicy, rng: Random) -> None:
        self._registry = registry
        self._policy = policy
        self._rng = rng
        self._log = structlog.get_logger().bind(part="lease")
        self._bucket = TokenBucket(WRITE_BURST, WRITES_PER_SECOND, boottime())
        self.etcd_lease = 0
        """Ours, under which a record is to stand that the snapshot does not show yet; 0: there is none."""
        self._renew_at: float | None = None
        """When that one is to be renewed."""
        self._ttl_settled = False
        """The etcd lease that we found at the start has the TTL that is wanted, or has been replaced."""
        self.ready_at = 0.0
        """By `boottime`: too much was written of late to write anything before."""
        self.written: Record | None = None
        """What this process last wrote, or tried to without learning what became of it."""
        self.awaited: Awaited | None = None
        """What the snapshot does not show yet."""
        self.foreign: frozenset[str] = frozenset()
        """Keys whose values cannot be read, and that somebody else keeps alive."""

    @property
    def wake_at(self) -> float | None:
        """When there is something to do although nothing is shown; None: nothing is awaited."""
        if self.awaited is None:
            return None
        return self.awaited.until if self._renew_at is None else min(self.awaited.until, self._renew_at)

    def write(self, decision: Write, ground: Ground) -> None:
        match decision:
            case Claim(wanted):
                self._claim(wanted, ground)
            case Adopt(record, wanted, from_silent):
                self._adopt(record, wanted, ground, from_silent)
            case Move(record, wanted, from_silent):
                self._move(record, wanted, ground, from_silent)
            case Release(record, reason):
                self._release(record, reason, ground)
            case Restore(wanted):
                self._restore(wanted, ground)

    def postponed(self, decision: Write) -> Problem:
        """What an operator is to know while a write must wait."""
        return Problem(
            "lease-waiting",
            f"{decision}, within {1 / WRITES_PER_SECOND:.0f} s: in short order it was written more than "
            f"{WRITE_BURST} times; what is set up stays meanwhile",
            "none is needed if that ends; else find out who undoes what this host writes (flannelctl leases)",
        )

    def await_change(self, key: str, snapshot: Snapshot, *, wrote: bool = False) -> None:
        """Decide again when the snapshot shows something else at `key`, or could have."""
        now = boottime()
        if wrote:
            self.ready_at = now + self._bucket.take(now)
        self.awaited = Awaited(key, snapshot, now + AWAIT_AT_MOST)

    def renew(self) -> None:
        """Keep a lease alive that the snapshot does not show yet, however long that takes."""
        if self.awaited is None or self._renew_at is None or boottime() < self._renew_at:
            return
        ttl = self._registry.keep_alive(self.etcd_lease)
        self._follow(self.etcd_lease if ttl > 0 else 0, ttl)

    def shown(self, snapshot: Snapshot) -> Record | None:
        """What this process last wrote, if it stands; another host may have been first at that key."""
        if self.written is None:
            return None
        found = snapshot.records.get(self.written.key)
        return found if found is not None and encode(found) == encode(self.written) else None

    def kept(self) -> None:
        """What we hold is shown as it should be."""
        self.etcd_lease, self._renew_at, self._ttl_settled = 0, None, True

    def _follow(self, lease: int, ttl: int) -> None:
        self.etcd_lease = lease
        interval = renew_interval(ttl) * self._rng.uniform(0.9, 1.0)
        self._renew_at = boottime() + interval if lease else None

    def _claim(self, wanted: Record, ground: Ground) -> None:
        lease = ground.lease
        if lease.own is not None and lease.state == "held":
            self._log.warning("lease_lost", key=lease.own.record.key, claiming=wanted.key)
        self._follow(self._lease_to_use(lease), self._policy.ttl)
        self.written = wanted
        try:
            written = self._registry.create(_path(wanted), encode(wanted), self.etcd_lease)
        except LeaseGone:
            self._follow(0, 0)
            raise
        self.await_change(wanted.key, ground.snapshot, wrote=written.ok)
        if written.ok:
            self._ttl_settled = True
            self._log.info("lease_claimed", key=wanted.key, revision=written.revision)
        else:
            self._log.info("lease_race_lost", key=wanted.key)

    def _lease_to_use(self, lease: LeaseState) -> int:
        """The etcd lease we have, when only its key was deleted or never stood; else a new one."""
        for ours in (self.etcd_lease, lease.own.record.etcd_lease if lease.own else 0):
            if ours and self._registry.keep_alive(ours) > 0:
                return ours
        return self._registry.grant(self._policy.ttl)

    def _is_ending(self, record: Record, ground: Ground) -> bool:
        """Whether etcd has ended its lease, and its delete is on its way to us."""
        lease = record.etcd_lease
        if not lease or self._registry.keep_alive(lease):
            return False
        self.await_change(record.key, ground.snapshot)
        return True

    def _lease_for(self, record: Record, ground: Ground, from_silent: bool) -> int:
        """Under which what takes the place of a record is to stand."""
        if not from_silent:
            return record.etcd_lease
        self._follow(self._lease_to_use(ground.lease), self._policy.ttl)
        return self.etcd_lease

    def _adopt(self, record: Record, wanted: Record, ground: Ground, from_silent: bool) -> None:
        # A renewal would keep a host's record that is gone: the guard tells whether it has ended.
        if not from_silent and self._is_ending(record, ground):
            return
        self.written = wanted
        lease = self._lease_for(record, ground, from_silent)
        written = self._registry.replace(_path(record), encode(wanted), lease, record.mod_revision)
        self.await_change(record.key, ground.snapshot, wrote=written.ok)
        self._log.info("lease_updated", key=record.key, done=written.ok, revision=written.revision)

    def _move(self, record: Record, wanted: Record, ground: Ground, from_silent: bool) -> None:
        if not from_silent and self._is_ending(record, ground):
            return
        self.written = wanted
        lease = self._lease_for(record, ground, from_silent)
        written = self._registry.move(
            _path(record), record.mod_revision, _path(wanted), encode(wanted), lease
        )
        self.await_change(wanted.key, ground.snapshot, wrote=written.ok)
        self._log.info("lease_moved", key=record.key, to=wanted.key, done=written.ok)

    def _release(self, record: Record, reason: str, ground: Ground) -> None:
        written = self._registry.delete(_path(record), record.mod_revision)
        self._log.warning("lease_released", key=record.key, reason=reason, done=written.ok)
        self.await_change(record.key, ground.snapshot, wrote=written.ok)

    def _restore(self, wanted: Record, ground: Ground) -> None:
        """Put right what somebody has written over our record: hosts that start now could not read it."""
        there, lease = self._registry.get(_path(wanted)), wanted.etcd_lease
        if there is None or _is_readable(there):
            self.await_change(wanted.key, ground.snapshot)
            return
        if wanted.key not in ground.snapshot.records and self._is_anothers(there, lease):
            self.foreign |= {wanted.key}
            self._log.warning(
                "lease_not_restored", key=wanted.key, reason="another etcd lease keeps it, or ours has ended"
            )
            self.await_change(wanted.key, ground.snapshot)
            return
        if lease and not self._registry.keep_alive(lease):
            lease = self._registry.grant(self._policy.ttl)
        self.written = wanted
        written = self._registry.replace(there.key, encode(wanted), lease, there.mod_revision)
        self.await_change(wanted.key, ground.snapshot, wrote=written.ok)
        self._log.warning("lease_restored", key=wanted.key, done=written.ok)

    def _is_anothers(self, there: Entry, ours: int) -> bool:
        """A value without etcd lease stands over our record only if that has not ended with its own."""
        lease = there.etcd_lease
        if lease == ours:
            return False
        if not lease:
            return self._registry.time_to_live(ours).left <= 0
        return self._registry.time_to_live(lease).left > 0

    def write_again(self, record: Record, ground: Ground) -> bool:
        """The same once more, for hosts of Go flannel; False: its lease has ended."""
        if self._is_ending(record, ground):
            return False
        self.written = record
        written = self._registry.replace(
            _path(record), encode(record), record.etcd_lease, record.mod_revision
        )
        self.await_change(record.key, ground.snapshot)
        self._log.info("lease_written_again", key=record.key, done=written.ok)
        return True

    def change_ttl(self, record: Record, ttl: int, ground: Ground) -> bool:
        """Move the record to an etcd lease with the TTL that is wanted now; False: nothing is to be done."""
        if self._ttl_settled or ttl == self._policy.ttl:
            return False
        fresh = self.etcd_lease or self._registry.grant(self._policy.ttl)
        self._follow(fresh, self._policy.ttl)
        if self._registry.keep_alive(fresh) == ttl:  # etcd grants no other
            self._follow(0, 0)
            self._registry.revoke(fresh)
            return False
        self.written = record
        written = self._registry.replace(_path(record), encode(record), fresh, record.mod_revision)
        self.await_change(record.key, ground.snapshot, wrote=written.ok)
        if written.ok:
            self._ttl_settled = True
            self._log.info("lease_ttl_changed", key=record.key, was=ttl, now=self._policy.ttl)
            with suppress(RegistryError):  # it then ends by itself
                # Other keys may hang on it, as an operator may have had his reasons.
                if not self._registry.time_to_live(record.etcd_lease, keys=True).keys:
                    self._registry.revoke(record.etcd_lease)
        return True


def _path(record: Record) -> str:
    return f"{SUBNETS_PREFIX}{record.key}"


def _is_readable(entry: Entry) -> bool:
    try:
        decode(entry)
    except RecordError:
        return False
    return True
