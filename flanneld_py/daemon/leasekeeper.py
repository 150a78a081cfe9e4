"""The thread that owns our lease: acquires it, renews it, claims it again when it is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import zip_longest

import structlog
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.leasedecision import (
    Adopt,
    Claim,
    Conflict,
    Decision,
    End,
    Keep,
    Move,
    Rename,
    Restore,
    Wait,
    Wish,
    Write,
)
from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.pace import Backoff
from flanneld_py.core.renewal import renew_interval, silent_in
from flanneld_py.core.subnetchoice import overlap
from flanneld_py.daemon.identity import Identity
from flanneld_py.daemon.inbox import Inbox, LeaseState, Levels, Problem, Recalled, boottime
from flanneld_py.daemon.leasefile import LeaseFile
from flanneld_py.daemon.leaseground import Ground, LastRun, complete_wish, ground_of, stands
from flanneld_py.daemon.leaseputs import PutSchedule
from flanneld_py.daemon.leaserenewal import renew
from flanneld_py.daemon.leasewriter import LeaseWriter
from flanneld_py.daemon.recall import doubts, seconds_left
from flanneld_py.drivers.etcd import EtcdRegistry
from flanneld_py.errors import FlanneldError, LeaseLost, RegistryError
from flanneld_py.model import OwnLease, Record, Snapshot

RETRIED = "remove the cause; it is tried again by itself"
REST = 0.02
"""Seconds until what has changed is looked at while the lease is held."""
CLOCK_LOOK = 5.0
"""Seconds between looks at the wall clock while a lease is gone by that only the clock speaks for."""
RETRY_SECONDS = 10.0
"""Until a decision that this host could not carry out is made again."""


class LeaseKeeper:
    """Offers `lease`. Decides only on complete snapshots, and believes only what the registry shows."""

    def __init__(
        self,
        registry: EtcdRegistry,
        inbox: Inbox,
        identity: Identity,
        last: LastRun,
        file: LeaseFile,
        policy: LeasePolicy,
        distrust: Callable[[], None],
    ) -> None:
        """`distrust` makes the registry be listed anew."""
        self._registry = registry
        self._inbox = inbox
        self._identity = identity
        self._last = last
        self._file = file
        self._policy = policy
        self._distrust = distrust
        self._log = structlog.get_logger().bind(part="lease")
        self._backoff = Backoff(longest=2.0)
        self._rng = random.Random()  # noqa: S311 - spreads the hosts over the range
        self._puts = PutSchedule(policy, self._rng, last.put_due)
        self._decided_on: tuple[object, ...] = ()
        self._writer = LeaseWriter(registry, policy, self._rng)
        self._silent: dict[str, int] = {}
        """Key → mod_revision of records whose owner has stopped renewing."""
        self._renew_at: float | None = None
        self._renewed_at = 0.0
        self._look_at: float | None = None
        """When to decide again although nothing has changed that we would be told of."""
        self._probed: tuple[str, int, float] = ("", 0, 0.0)
        """Key and mod_revision of the record whose owner was last seen alive, and until when it must be."""
        self._lacking = True
        """A level is missing, without which nothing can be done but renewing."""

    def run(self) -> None:
        """Until the inbox stops.

        Raises:
            LeaseLost: the process is to end.
        """
        seen = -1
        while not self._inbox.stopped:
            seen, levels = self._inbox.wait(seen, self._wake_at())
            if levels.lease.state == "held":
                # What others do concerns us little: the kernel is to follow them first.
                self._inbox.pause(REST)
                self._inbox.let_set_up()
                levels = self._inbox.levels
            try:
                self._step(levels)
                self._backoff.reset()
            except RegistryError as error:
                self._decided_on = ()
                self._failed(levels.lease.own, error)
                self._inbox.pause(self._backoff.delay(self._rng.random()))
                seen = -1
            except LeaseLost:
                raise
            except FlanneldError as error:
                # The same inputs would give the same answer: wait for others, and renew meanwhile.
                self._offer(LeaseState("waiting", problem=Problem("lease-waiting", str(error), RETRIED)))

    def _wake_at(self) -> float | None:
        times: tuple[float | None, ...]
        if self._lacking:
            times = (self._renew_at,)
        elif self._writer.awaited is not None:
            times = (self._renew_at, self._writer.wake_at)
        else:
            times = (self._renew_at, self._look_at, self._puts.at)
        return min((time for time in times if time is not None), default=None)

    def _step(self, levels: Levels) -> None:
        if self._renew_at is not None and boottime() >= self._renew_at:
            self._renew(levels)
        self._writer.renew()
        ground = ground_of(levels)
        # A new node id comes back with what host-watch tells.
        self._lacking = ground is None or ground.host.node_id != self._identity.node_id
        if ground is None or self._lacking:
            return
        if levels.recalled is not None:
            self._go_by(levels.recalled, ground)
            return
        awaited = self._writer.awaited
        if awaited is not None:
            if awaited.holds(ground.snapshot):
                return
            if awaited.in_vain(ground.snapshot):
                # etcd has carried out what the watch does not show.
                self._distrust()
            self._writer.awaited = None
            self._decided_on = ()
        own = ground.lease.own
        if own is not None and ground.stands and own.record.key in ground.snapshot.bad:
            self._act(Restore(own.record), ground)
        elif self._must_decide(ground):
            self._act(self._decide(ground), ground)
        elif own is not None and ground.stands and ground.lease.state == "held":
            self._write_again(own, ground)

    def _must_decide(self, ground: Ground) -> bool:
        own = ground.lease.own
        if not ground.stands:
            self._renew_at = None
        basis = own.record if own is not None and ground.settled else ground.snapshot
        inputs = (ground.network, ground.host, basis)
        due = self._look_at is not None and boottime() >= self._look_at
        if not due and not any(new is not old for new, old in zip_longest(inputs, self._decided_on)):
            return False
        self._look_at = None
        self._decided_on = inputs
        return True

    def _decide(self, ground: Ground) -> Decision:
        records = ground.snapshot.records
        self._silent = {
            key: revision
            for key, revision in self._silent.items()
            if key in records and records[key].mod_revision == revision
        }
        self._writer.foreign &= ground.snapshot.bad.keys()
        wish = Wish(
            backend_type="",
            public_ips=PerFamily(),
            written=self._writer.written,
            granted=self._writer.etcd_lease,
            silent=frozenset(self._silent),
            foreign=self._writer.foreign,
            fixed_id=self._identity.fixed,
            on_loss=self._policy.on_loss,
        )
        wish = complete_wish(wish, ground, self._last)
        return decide_lease(ground.network.config, ground.snapshot, ground.host, wish, self._rng)

    def _act(self, decision: Decision, ground: Ground) -> None:
        match decision:
            case Keep(record):
                self._keep(record, ground)
            case Rename(record, reason):
                self._rename(record, reason, ground)
            case Conflict(record, reason, fix, held):
                own = self._hold_on(held, ground)
                self._offer(LeaseState("conflict", own, Problem("lease-conflict", reason, fix)))
                self._probe(record)
            case Wait(reason, fix, held):
                own = self._hold_on(held, ground)
                self._offer(LeaseState("waiting", own, Problem("lease-waiting", reason, fix)))
            case End(reason, fix):
                raise LeaseLost(f"{reason}; {fix}")
            case write:
                self._write(write, ground)

    def _write(self, decision: Write, ground: Ground) -> None:
        """Now, or when it may be: what stands stays until then, and is kept from ending."""
        if boottime() >= self._writer.ready_at:
            if isinstance(decision, Claim) and ground.lease.own is None:
                self._tell_change(decision.wanted, ground.snapshot)
            try:
                self._writer.write(decision, ground)
            except RegistryError as error:
                self._tell_refused(ground, error)
                raise
            if self._writer.awaited is None:
                self._look_at = boottime()
            return
        self._look_at = self._writer.ready_at
        own = self._hold_on(decision.record if isinstance(decision, Adopt | Move) else None, ground)
        self._offer(LeaseState("waiting", own, self._writer.postponed(decision)))

    def _write_again(self, own: OwnLease, ground: Ground) -> None:
        """The same once more, if it is time to, for hosts of Go flannel."""
        due = self._puts.due
        self._puts.look(ground.snapshot, own)
        if self._puts.at is not None and boottime() >= self._puts.at:
            if not self._writer.write_again(own.record, ground):
                return
            self._puts.written(own)
        if self._puts.due != due:
            self._file.save(own.record, ground, self._puts.due)

    # --- holding

    def _go_by(self, recalled: Recalled, ground: Ground) -> None:
        """Hold what the last run held, as long as there is no etcd to ask."""
        now = time.time()
        left = seconds_left(recalled, now)
        self._look_at = boottime() + (min(left, CLOCK_LOOK) if left is not None and left > 0 else CLOCK_LOOK)
        if not ground.lease.recalled:
            self._last = self._last.then(recalled.own.record, ground.host.external.mac)
            self._renewed_at = boottime()
        doubt = doubts(recalled, ground.host, now)
        self._offer(LeaseState("held", recalled.own, doubt, recalled=True))

    def _keep(self, record: Record, ground: Ground) -> None:
        is_held = ground.lease.state == "held" and not ground.lease.recalled
        held = ground.lease.own if is_held else None
        if held is not None and held.record is record:
            return
        own = OwnLease(record, 0)
        if record.etcd_lease:
            ttl = self._registry.keep_alive(record.etcd_lease)
            if ttl <= 0:
                # etcd has ended the lease; the delete of the record is on its way to us.
                self._writer.await_change(record.key, ground.snapshot)
                return
            if self._writer.change_ttl(record, ttl, ground):
                return
            own = OwnLease(record, ttl)
        self._writer.kept()
        self._renewed(own)
        self._last = self._last.then(record, ground.host.external.mac)
        self._silent = {}
        self._offer(LeaseState("held", own).renewed(self._renewed_at))
        # What was decided about all records need not be decided once more about ours alone.
        self._decided_on = (ground.network, ground.host, record)
        self._file.save(record, ground, self._puts.due)
        if held is None or held.record.key != record.key:
            self._log.info("lease_held", key=record.key, ttl=own.ttl)

    def _hold_on(self, record: Record | None, ground: Ground) -> OwnLease | None:
        """Keep a record of ours from ending that is not as it should be; None: we have it no more."""
        own = ground.lease.own
        if own is not None and own.record is record and not ground.lease.recalled:
            return own
        if record is None or record.node_id != ground.host.node_id:
            return None  # Go flannel's of this host, which we have not taken over
        ttl = self._registry.keep_alive(record.etcd_lease) if record.etcd_lease else 0
        if record.etcd_lease and ttl <= 0:
            return None
        own = OwnLease(record, ttl)
        self._renewed(own)
        return own

    def _renew(self, levels: Levels) -> None:
        own, snapshot = levels.lease.own, levels.snapshot
        if own is None or snapshot is None or not stands(levels.lease, snapshot):
            self._renew_at = None
        elif renew(self._registry, own.record.etcd_lease, self._inbox.counts):
            self._renewed(own)
            self._offer(levels.lease.renewed(self._renewed_at))
        else:
            self._log.warning("lease_expired", key=own.record.key)
            self._renew_at = None
            self._writer.await_change(own.record.key, snapshot)

    def _renewed(self, own: OwnLease) -> None:
        self._renewed_at = boottime()
        jitter = self._rng.uniform(0.9, 1.0)
        # A reservation (a record without etcd lease) never ends and is never renewed.
        self._renew_at = self._renewed_at + renew_interval(own.ttl) * jitter if own.ttl else None

    # --- others in our way

    def _tell_change(self, wanted: Record, snapshot: Snapshot) -> None:
        """A start that does not come to the subnet of the last run, of which containers have addresses."""
        if not self._last.previous or wanted.subnets in self._last.previous:
            return
        was = self._last.previous[0]
        holder = next((r for r in snapshot.records.values() if overlap(r.subnets, was)), None)
        self._log.warning(
            "other_subnet",
            was=[str(net) for net in was.values()],
            now=[str(net) for net in wanted.subnets.values()],
            reason=f"it is held by {holder.key}, {holder.node_id or 'without node id'}"
            if holder
            else "it does not fit the network config any more",
            fix="restart containers with addresses of the earlier one",
        )

    def _rename(self, record: Record, reason: str, ground: Ground) -> None:
        """We are the clone, unless the other host is gone."""
        if self._probe(record):
            return
        own = self._writer.shown(ground.snapshot)
        if own is not None:
            # By this the next run knows our record, which bears the old id until it is written again.
            self._file.save(own, ground, self._puts.due)
        self._look_at = boottime() + RETRY_SECONDS
        fresh = self._identity.renew()
        self._log.warning(
            "node_id_changed",
            reason=reason,
            now=fresh,
            fix="none is needed; machines that are cloned share /etc/machine-id and --state-dir",
        )

    def _probe(self, record: Record) -> bool:
        """Whether its owner has stopped renewing; if not, it is looked again when that may be.

        Only hosts of ours renew all the time; how much is left of any other's lease tells nothing.
        """
        if not record.etcd_lease or not record.node_id:
            return False
        key, revision, alive_until = self._probed
        if (key, revision) == (record.key, record.mod_revision) and boottime() < alive_until:
            self._look_at = alive_until
            return False
        left, granted, _ = self._registry.time_to_live(record.etcd_lease)
        wait = silent_in(left, granted)
        self._look_at = boottime() + (wait + 1 if wait else 0.0)
        if wait:
            self._probed = (record.key, record.mod_revision, self._look_at)
        else:
            self._silent[record.key] = record.mod_revision
        return not wait

    def _failed(self, own: OwnLease | None, error: RegistryError) -> None:
        """Say so when it matters: without a lease at once, with one when it has run out."""
        self._log.debug("lease_retry", error=str(error))
        if own is None:
            self._offer(LeaseState("waiting", problem=Problem("lease-waiting", str(error), RETRIED)))
        elif own.ttl and boottime() >= self._renewed_at + own.ttl:
            reason = f"lease {own.record.key} was not renewed for {own.ttl} s: {error}"
            fix = "bring etcd back; the data plane stays as it is and the subnet is claimed again"
            self._offer(LeaseState("lost", own, Problem("lease-expired", reason, fix)))

    def _tell_refused(self, ground: Ground, error: RegistryError) -> None:
        """A write that etcd refuses: our record is gone, or not as it should be."""
        own = ground.lease.own
        if own is None or self._inbox.levels.registry.state != "in sync":
            return
        what = "cannot be changed" if ground.stands else "is gone, and cannot be claimed again"
        problem = Problem("lease-waiting", f"lease {own.record.key} {what}: {error}", RETRIED)
        self._offer(LeaseState("waiting" if ground.stands else "lost", own, problem))

    def _offer(self, fresh: LeaseState) -> None:
        last = self._inbox.levels.lease
        problem = fresh.problem
        if problem and problem != last.problem:
            self._log.warning(problem.code.replace("-", "_"), reason=problem.reason, fix=problem.fix)
        # What was held stays in force in the data plane until something else is held.
        fresh = replace(fresh, own=fresh.own or last.own)
        if fresh.state == "conflict" != last.state:
            self._inbox.counts.add("lease_conflicts")
        if fresh != last:
            self._inbox.offer(lease=fresh)
