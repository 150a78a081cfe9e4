"""What a decision on our lease stands on: the levels, what earlier runs left, what is still on its way."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.addresses import Subnets
from flanneld_py.core.allocate import find_own
from flanneld_py.core.leasedecision import Wish
from flanneld_py.core.records import format_key, said_since
from flanneld_py.core.statefile import SavedState
from flanneld_py.daemon.inbox import LeaseState, Levels, Network, boottime
from flanneld_py.model import Host, Record, Snapshot

PREVIOUS_KEPT = 3


class Ground(NamedTuple):
    """The levels; all of them must be there."""

    network: Network
    host: Host
    snapshot: Snapshot
    lease: LeaseState

    @property
    def stands(self) -> bool:
        return stands(self.lease, self.snapshot)

    @property
    def settled(self) -> bool:
        """With the record that we want in place and nobody in our way, others' do not matter.

        But for a second one of ours: of a write whose answer was lost, say, that etcd carried out after all.
        """
        return self.stands and self.lease.state not in ("conflict", "waiting") and not self._has_second

    @property
    def _has_second(self) -> bool:
        own = self.lease.own
        return own is not None and any(
            record.node_id == self.host.node_id and record.key != own.record.key
            for record in self.snapshot.records.values()
        )


def stands(lease: LeaseState, snapshot: Snapshot | None) -> bool:
    """Whether the record that we hold is in the registry as we know it."""
    own = lease.own
    return own is not None and snapshot is not None and snapshot.records.get(own.record.key) is own.record


def ground_of(levels: Levels) -> Ground | None:
    """None while a level is missing."""
    host = levels.fitting_host
    if levels.network is None or levels.snapshot is None or host is None:
        return None
    return Ground(levels.network, host, levels.snapshot, levels.lease)


class LastRun(Struct, frozen=True):
    """What earlier runs left behind, and then this one."""

    previous: tuple[Subnets, ...] = ()
    key: str = ""
    etcd_lease: int = 0
    mac: str = ""
    """Of the external interface then; empty when it is not known."""
    put_due: float = 0.0
    """As in `SavedState`."""

    @classmethod
    def of(cls, saved: SavedState, *others: Subnets) -> LastRun:
        """`others`: subnets that other files tell of."""
        known = [subnets for subnets in (saved.subnets, *others) if subnets.values()]
        key = format_key(saved.subnets) if saved.subnets.values() else ""
        return cls(tuple(dict.fromkeys(known)), key, saved.etcd_lease, saved.mac, saved.put_due)

    def then(self, record: Record, mac: str) -> LastRun:
        """After this record was held."""
        previous = tuple(dict.fromkeys((record.subnets, *self.previous)))[:PREVIOUS_KEPT]
        return replace(self, previous=previous, key=record.key, etcd_lease=record.etcd_lease, mac=mac)


def complete_wish(wish: Wish, ground: Ground, last: LastRun) -> Wish:
    """`wish` with what follows from the levels: what to publish, and what proves a record to be ours."""
    host, backend = ground.host, ground.network.backend
    same_machine = last.mac in ("", host.external.mac)
    wish = replace(
        wish,
        backend_type=backend.published(host, None).backend_type,
        public_ips=host.external.public,
        previous=last.previous,
        etcd_lease=last.etcd_lease if same_machine else 0,
        last_key=last.key if same_machine else "",
        held=_held(ground),
    )
    own = find_own(ground.network.config, ground.snapshot, host, wish)
    published = backend.published(host, own, _macs_of_others(ground.snapshot, own))
    return replace(
        wish,
        backend_type=published.backend_type,
        public_ips=published.public_ips,
        backend_data=published.backend_data,
    )


def _held(ground: Ground) -> Record | None:
    """What this process holds.

    Not what an earlier one held and etcd still has: as at every start it does not matter who wrote it since.
    """
    own = ground.lease.own
    if own is None:
        return None
    there = ground.snapshot.records.get(own.record.key)
    still_ours = there is not None and there.node_id == ground.host.node_id
    return None if ground.lease.recalled and still_ours else own.record


def _macs_of_others(snapshot: Snapshot, own: Record | None) -> frozenset[str]:
    """VTEP MACs that somebody published before us."""
    since = said_since(own) if own is not None else 0
    return frozenset(
        mac
        for record in snapshot.records.values()
        if own is None or (record.key != own.key and said_since(record) < since)
        for mac in record.vtep_macs.values()
    )


class Awaited(Struct, frozen=True):
    """A change at `key`, which the snapshot does not show yet: mostly a write of ours."""

    key: str
    seen: Snapshot
    until: float

    def holds(self, snapshot: Snapshot) -> bool:
        return boottime() < self.until and self._is_unchanged(snapshot)

    def in_vain(self, snapshot: Snapshot) -> bool:
        return boottime() >= self.until and self._is_unchanged(snapshot)

    def _is_unchanged(self, snapshot: Snapshot) -> bool:
        same_record = snapshot.records.get(self.key) is self.seen.records.get(self.key)
        return same_record and snapshot.bad.get(self.key) == self.seen.bad.get(self.key)
