"""The thread that owns our lease: acquires it, renews it, claims it again when it is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import structlog

from flanneld_py.core.allocate import (
    Adopt,
    Claim,
    Conflict,
    Decision,
    Keep,
    Release,
    Wait,
    Wish,
    decide_lease,
    find_own,
)
from flanneld_py.core.pace import Backoff, TokenBucket
from flanneld_py.core.records import SUBNETS_PREFIX, decode, encode
from flanneld_py.core.statefile import SavedState, render_state
from flanneld_py.daemon.inbox import Inbox, LeaseState, Levels, Network, Problem, boottime
from flanneld_py.drivers.etcd import EtcdRegistry
from flanneld_py.drivers.files import write_atomically
from flanneld_py.errors import FlanneldError, LeaseGone, RecordError, RegistryError
from flanneld_py.model import Entry, Host, OwnLease, Record, Snapshot, Subnets

TTL = 86_400
"""Seconds; what flannel grants."""
RENEW_AT_MOST_EVERY = 300.0


def renew_interval(ttl: int) -> float:
    """Seconds between KeepAlives: often enough to survive two lost ones, rare enough for a large fleet."""
    return min(ttl / 3, RENEW_AT_MOST_EVERY)


RETRIED = "remove the cause; it is tried again by itself"
WRITE_BURST, WRITES_PER_SECOND = 5, 0.1
"""Somebody who undoes what we write must not make us write for ever."""
AWAIT_AT_MOST = 2.0
"""Seconds until a decision is made again although the snapshot does not show our write yet."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """A write of ours that the snapshot does not show yet."""

    key: str
    seen: Record | None
    at_most: float
    at_least: float

    @property
    def until(self) -> float:
        return max(self.at_most, self.at_least)

    def holds(self, snapshot: Snapshot) -> bool:
        return boottime() < (self.at_most if self._is_unchanged(snapshot) else self.at_least)

    def in_vain(self, snapshot: Snapshot) -> bool:
        return boottime() >= self.at_most and self._is_unchanged(snapshot)

    def _is_unchanged(self, snapshot: Snapshot) -> bool:
        return snapshot.records.get(self.key) is self.seen


class Ground(NamedTuple):
    """What a decision stands on; all of it must be there."""

    network: Network
    host: Host
    snapshot: Snapshot
    lease: LeaseState


@dataclass(frozen=True, slots=True)
class LastRun:
    """What earlier runs left behind."""

    previous: tuple[Subnets, ...] = ()
    etcd_lease: int = 0
    mac: str = ""
    """Of the external interface then; empty when it is not known."""


class LeaseKeeper:
    """Offers `lease`. Decides only on complete snapshots, and believes only what the registry shows."""

    def __init__(
        self,
        registry: EtcdRegistry,
        inbox: Inbox,
        last: LastRun,
        state_file: Path,
        distrust: Callable[[], None],
    ) -> None:
        """`distrust` makes the registry be listed anew."""
        self._registry = registry
        self._distrust = distrust
        self._inbox = inbox
        self._last = last
        self._state_file = state_file
        self._saved = ""
        self._log = structlog.get_logger().bind(part="lease")
        self._backoff = Backoff(longest=2.0)
        self._rng = random.Random()  # noqa: S311 - spreads the hosts over the range
        self._decided_on: tuple[object, ...] = ()
        self._awaited: Awaited | None = None
        self._bucket = TokenBucket(WRITE_BURST, WRITES_PER_SECOND, boottime())
        self._silent: frozenset[str] = frozenset()
        self._etcd_lease = 0
        """Granted by us and not attached to a record yet."""
        self._renew_at: float | None = None
        self._renewed_at = 0.0
        self._probe_at = 0.0

    def run(self) -> None:
        """Until the inbox stops."""
        seen = -1
        while not self._inbox.stopped:
            seen, levels = self._inbox.wait(seen, self._wake_at())
            try:
                self._step(levels)
                self._backoff.reset()
            except RegistryError as error:
                self._decided_on = ()
                self._failed(levels.lease.own, error)
                self._inbox.pause(self._backoff.delay(self._rng.random()))
                seen = -1
            except FlanneldError as error:
                # The same inputs would give the same answer: wait for others, and renew meanwhile.
                self._offer(LeaseState("waiting", problem=Problem("lease-waiting", str(error), "")))

    def _wake_at(self) -> float | None:
        return self._awaited.until if self._awaited is not None else self._renew_at

    def _step(self, levels: Levels) -> None:
        if levels.network is None or levels.snapshot is None or levels.host is None:
            return
        ground = Ground(levels.network, levels.host, levels.snapshot, levels.lease)
        if self._awaited is not None:
            if self._awaited.holds(ground.snapshot):
                return
            if self._awaited.in_vain(ground.snapshot):
                # etcd has carried out what the watch does not show.
                self._distrust()
            self._awaited = None
            self._decided_on = ()
        own = ground.lease.own
        standing = own is not None and ground.snapshot.records.get(own.record.key) is own.record
        due = self._renew_at is not None and boottime() >= self._renew_at
        if due and own is not None and standing:
            self._renew(own)
            if self._awaited is not None:
                return
            due = ground.lease.state == "conflict"
        # With our record in place and nobody in our way, other hosts' records are no reason to decide again.
        settled = own.record if own and standing and ground.lease.state != "conflict" else ground.snapshot
        inputs = (ground.network, ground.host, settled)
        if own is not None and standing and own.record.key in ground.snapshot.bad:
            self._restore(own.record)
        elif due or any(new is not old for new, old in zip_longest(inputs, self._decided_on)):
            self._renew_at = self._renew_at if standing else None
            self._decided_on = inputs
            self._act(self._decide(ground), ground)

    def _decide(self, ground: Ground) -> Decision:
        held = ground.lease.own.record if ground.lease.own else None
        same_machine = self._last.mac in ("", ground.host.external.mac)
        wish = Wish(
            backend_type="",
            public_ips=ground.host.external.public,
            previous=self._last.previous,
            etcd_lease=self._last.etcd_lease if same_machine else 0,
            held=held,
            silent=self._silent,
        )
        own = find_own(ground.snapshot, ground.host, wish)
        taken = _macs_of_others(ground.snapshot, own)
        published = ground.network.backend.published(ground.host, own, taken)
        wish = replace(
            wish,
            backend_type=published.backend_type,
            public_ips=published.public_ips,
            backend_data=published.backend_data,
        )
        return decide_lease(ground.network.config, ground.snapshot, ground.host, wish, self._rng)

    def _act(self, decision: Decision, ground: Ground) -> None:
        match decision:
            case Keep(record):
                self._keep(record, ground)
            case Adopt(record, wanted):
                self._adopt(record, wanted)
            case Claim(wanted):
                self._claim(wanted, ground.lease)
            case Release(record, reason):
                written = self._registry.delete(f"subnets/{record.key}", record.mod_revision)
                self._log.warning("lease_released", key=record.key, reason=reason, done=written.ok)
                self._await_change(record.key, record, wrote=written.ok)
            case Conflict(record, reason, fix):
                self._conflict(record, reason, fix)
            case Wait(reason, fix):
                self._offer(LeaseState("waiting", problem=Problem("lease-waiting", reason, fix)))

    def _claim(self, wanted: Record, lease: LeaseState) -> None:
        if lease.own is not None and lease.state == "held":
            self._log.warning("lease_lost", key=lease.own.record.key, claiming=wanted.key)
        self._etcd_lease = self._etcd_lease or self._lease_to_use(lease.own)
        try:
            written = self._registry.create(f"subnets/{wanted.key}", encode(wanted), self._etcd_lease)
        except LeaseGone:
            self._etcd_lease = 0
            raise
        self._await_change(wanted.key, None, wrote=written.ok)
        if written.ok:
            self._etcd_lease = 0
            self._log.info("lease_claimed", key=wanted.key, revision=written.revision)
        else:
            self._log.info("lease_race_lost", key=wanted.key)

    def _lease_to_use(self, own: OwnLease | None) -> int:
        """The etcd lease we have, when only its key was deleted; else a new one."""
        lease = own.record.etcd_lease if own else 0
        return lease if lease and self._registry.keep_alive(lease) > 0 else self._registry.grant(TTL)

    def _adopt(self, record: Record, wanted: Record) -> None:
        lease = record.etcd_lease
        if lease and not self._registry.keep_alive(lease):
            self._await_change(record.key, record)
            return
        written = self._registry.replace(f"subnets/{record.key}", encode(wanted), lease, record.mod_revision)
        self._await_change(record.key, record, wrote=written.ok)
        self._log.info("lease_updated", key=record.key, done=written.ok, revision=written.revision)

    def _keep(self, record: Record, ground: Ground) -> None:
        held = ground.lease.own if ground.lease.state == "held" else None
        if held is not None and held.record is record:
            return
        own = OwnLease(record, 0)
        if record.etcd_lease:
            ttl = self._registry.keep_alive(record.etcd_lease)
            if ttl <= 0:
                # etcd has ended the lease; the delete of the record is on its way to us.
                self._await_change(record.key, record)
                return
            own = OwnLease(record, ttl)
        self._renewed(own)
        self._last = LastRun(
            (record.subnets, *self._last.previous[:2]), record.etcd_lease, ground.host.external.mac
        )
        self._silent = frozenset()
        self._offer(LeaseState("held", own))
        self._save(record, ground)
        if held is None or held.record.key != record.key:
            self._log.info("lease_held", key=record.key, ttl=own.ttl)

    def _restore(self, record: Record) -> None:
        """Put right what somebody has written over our record: hosts that start now could not read it."""
        there = self._registry.get(f"{SUBNETS_PREFIX}{record.key}")
        if there is None or _is_readable(there):
            self._await_change(record.key, record)
            return
        lease = record.etcd_lease
        if lease and not self._registry.keep_alive(lease):
            lease = self._registry.grant(TTL)
        written = self._registry.replace(there.key, encode(record), lease, there.mod_revision)
        self._await_change(record.key, record, wrote=written.ok)
        self._log.warning("lease_restored", key=record.key, done=written.ok)

    def _renew(self, own: OwnLease) -> None:
        if self._registry.keep_alive(own.record.etcd_lease) > 0:
            self._renewed(own)
            return
        self._log.warning("lease_expired", key=own.record.key)
        self._renew_at = None
        self._await_change(own.record.key, own.record)

    def _renewed(self, own: OwnLease) -> None:
        self._renewed_at = boottime()
        jitter = self._rng.uniform(0.9, 1.0)
        # A reservation (a record without etcd lease) never ends and is never renewed.
        self._renew_at = self._renewed_at + renew_interval(own.ttl) * jitter if own.ttl else None

    def _conflict(self, record: Record, reason: str, fix: str) -> None:
        """Somebody stands in our place: take it over once its owner has stopped renewing.

        Only hosts of ours renew all the time; how much is left of any other's lease tells nothing.
        """
        self._offer(LeaseState("conflict", problem=Problem("lease-conflict", reason, fix)))
        if not record.etcd_lease or not record.node_id:
            return
        if boottime() >= self._probe_at:
            self._probe_at = boottime() + renew_interval(TTL)
            if self._registry.time_to_live(record.etcd_lease) < TTL - 3 * renew_interval(TTL):
                self._silent |= {record.key}
                self._probe_at = boottime()
        self._renew_at = self._probe_at

    def _failed(self, own: OwnLease | None, error: RegistryError) -> None:
        """Say so when it matters: without a lease at once, with one when it has run out."""
        self._log.debug("lease_retry", error=str(error))
        if own is None:
            self._offer(LeaseState("waiting", problem=Problem("lease-waiting", str(error), RETRIED)))
        elif own.ttl and boottime() >= self._renewed_at + own.ttl:
            reason = f"lease {own.record.key} was not renewed for {own.ttl} s: {error}"
            fix = "bring etcd back; the data plane stays as it is and the subnet is claimed again"
            self._offer(LeaseState("lost", own, Problem("lease-expired", reason, fix)))

    def _await_change(self, key: str, seen: Record | None, *, wrote: bool = False) -> None:
        """Decide again when the snapshot shows something else at `key` than `seen`, and not too soon."""
        now = boottime()
        rest = self._bucket.take(now) if wrote else 0.0
        self._awaited = Awaited(key, seen, now + AWAIT_AT_MOST, now + rest)

    def _offer(self, fresh: LeaseState) -> None:
        last = self._inbox.levels.lease
        problem = fresh.problem
        if problem and problem != last.problem:
            self._log.warning(problem.code.replace("-", "_"), reason=problem.reason, fix=problem.fix)
        # What was held stays in force in the data plane until something else is held.
        fresh = replace(fresh, own=fresh.own or last.own)
        if fresh != last:
            self._inbox.offer(lease=fresh)

    def _save(self, record: Record, ground: Ground) -> None:
        text = render_state(
            SavedState(
                prefix=ground.host.prefix,
                node_id=ground.host.node_id,
                networks=ground.network.config.networks,
                subnets=record.subnets,
                etcd_lease=record.etcd_lease,
                mac=ground.host.external.mac,
            )
        )
        if text == self._saved:
            return
        try:
            write_atomically(self._state_file, text)
            self._saved = text
        except OSError as error:
            self._log.warning("state_not_saved", path=str(self._state_file), error=str(error))


def _macs_of_others(snapshot: Snapshot, own: Record | None) -> frozenset[str]:
    """VTEP MACs that somebody published before us."""
    return frozenset(
        mac
        for record in snapshot.records.values()
        if own is None or (record.key != own.key and record.mod_revision < own.mod_revision)
        for mac in record.vtep_macs.values()
    )


def _is_readable(entry: Entry) -> bool:
    try:
        decode(entry)
    except RecordError:
        return False
    return True
