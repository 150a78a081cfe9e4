"""Peers whose record has vanished stay for a moment: mostly their host claims its subnet again.

That is the wipe hold, too: hosts do not die in great numbers at once, but etcd loses its data, or an operator
deletes too much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.addresses import IPAddress
from flanneld_py.errors import RecordError
from flanneld_py.model import Record, Snapshot

RECLAIM_SECONDS = 2.0
"""For a record deleted or expired: its host, if it lives, sees that at the same moment as we do."""
WIPE_GRACE = 60.0
"""For many at once, and all when etcd lost its data: as many hosts have to notice, connect and claim …"""
WIPE_LEAST, WIPE_SHARE = 3, 0.2
"""… that is, for more of them than both this number and this share of all …"""
WIPE_WITHIN = 10.0
"""… in so many seconds."""


class Departed(Struct, frozen=True):
    """The last record of a peer that has none in the registry any more."""

    record: Record
    until: float
    """When it ceases to be a peer, on the clock that `departures` was given."""
    wiped: bool = False
    """It left together with many."""


class Departures(Struct, frozen=True):
    """The peers that have left."""

    kept: Mapping[str, Departed] = field(default_factory=dict)
    """By key: those that stay for a moment."""
    vanished: Mapping[str, float] = field(default_factory=dict)
    """Key → when, of all that have left in the last WIPE_WITHIN seconds, back or not."""

    @property
    def held(self) -> list[str]:
        """Keys of those that stay because of a wipe."""
        return [key for key, gone in self.kept.items() if gone.wiped]

    @property
    def records(self) -> list[Record]:
        return [gone.record for gone in self.kept.values()]


def left_since(last: Snapshot, fresh: Snapshot) -> set[str]:
    """The keys of `last` that `fresh` lacks, without a look at all of them where the difference is known."""
    since = fresh.since
    touched = since[1] if since is not None and since[0] is last.records else last.records.keys()
    # Not `touched - fresh.records.keys()`, which goes through all of these.
    return {key for key in touched if key not in fresh.records}


def departures(
    earlier: Departures, last: Snapshot, fresh: Snapshot, peers: Collection[str], now: float, grace: float
) -> Departures:
    """Which peers to keep although `fresh` lacks them, `last` being the snapshot before it.

    A peer that is back, under whatever key, is none of them, and none whose key somebody else holds now. Nor
    is a record that was no peer: ours, a reservation that no host has taken, one that was left out.

    Args:
        earlier: what this returned last.
        last: the snapshot then.
        fresh: the snapshot now.
        peers: keys of the records that were peers then.
        now: on any clock, in seconds.
        grace: seconds that peers stay after a wipe; 0: not longer than after any deletion.
    """
    kept = {key: gone for key, gone in earlier.kept.items() if gone.until > now}
    vanished = {key: at for key, at in earlier.vanished.items() if at > now - WIPE_WITHIN}
    if last is fresh:
        return Departures(kept, vanished)
    kept = {key: kept[key] for key in _still_gone((gone.record for gone in kept.values()), fresh)}
    known = {key for key in peers if key in last.records}
    leaving = {key: last.records[key] for key in known if key not in fresh.records}
    if not leaving:
        return Departures(kept, vanished)
    wiped = last.epoch != fresh.epoch
    if not wiped:
        # What a new etcd lacks nobody has deleted, and does not count when somebody deletes one from it.
        vanished |= dict.fromkeys(leaving, now)
        wiped = _is_wipe(len(vanished), len(known | vanished.keys()))
    wiped = wiped and grace > 0
    until = now + (max(grace, RECLAIM_SECONDS) if wiped else RECLAIM_SECONDS)
    if wiped:
        kept = {key: replace(gone, until=max(gone.until, until), wiped=True) for key, gone in kept.items()}
    stay = _still_gone(leaving.values(), fresh)
    return Departures(kept | {key: Departed(leaving[key], until, wiped) for key in stay}, vanished)


def departures_since(
    last_run: Snapshot,
    fresh: Snapshot,
    own: str,
    now: float,
    grace: float,
    held: Collection[str] = (),
    created: Mapping[str, int] | None = None,
) -> Departures:
    """The same for the first snapshot of a process, `last_run` being the peers that an earlier one had.

    It has gone on without us, so only a wipe keeps them, or that they were `held` then already: who has just
    left alone had the time to return.

    `created`: key → create_revision of all records that etcd held then.
    """
    others = last_run.records.keys() - {own}
    leaving = [key for key in last_run.records if key in others and key not in fresh.records]
    lost = (
        last_run.cluster_id != fresh.cluster_id
        or last_run.revision > fresh.revision
        or nothing_stands(created or {}, fresh.records)
    )
    if not (lost or _is_wipe(len(leaving), len(others))):
        leaving = [key for key in leaving if key in held]
    gone: dict[str, Record] = {}
    for key in leaving if grace > 0 else ():
        with suppress(RecordError):  # what a file has is read only here
            gone[key] = last_run.records[key]
    stay = _still_gone(gone.values(), fresh)
    return Departures({key: Departed(gone[key], now + grace, wiped=True) for key in stay})


def nothing_stands(created: Mapping[str, int], fresh: Mapping[str, Record]) -> bool:
    """Whether etcd has lost all it held, though it may have as many revisions again by now.

    `created`: key → create_revision of what it held. A record that was created anew is another one.
    """
    return bool(created) and not any(
        key in fresh and fresh[key].create_revision == revision for key, revision in created.items()
    )


def _is_wipe(gone: int, known: int) -> bool:
    return gone > max(WIPE_LEAST, WIPE_SHARE * known)


def _still_gone(records: Iterable[Record], fresh: Snapshot) -> list[str]:
    """Keys of those whose key is free and whose host has no other record now."""
    gone = [record for record in records if record.key not in fresh.records]
    if not gone:
        return []
    living = fresh.records.values()
    node_ids = {record.node_id for record in living}
    addresses = _addresses(living)
    of_nameless = _addresses(record for record in living if not record.node_id)
    return [
        record.key
        for record in gone
        if not (
            (record.node_id in node_ids or _has_one_of(record, of_nameless))
            if record.node_id
            else _has_one_of(record, addresses)
        )
    ]


def _addresses(records: Iterable[Record]) -> frozenset[IPAddress]:
    return frozenset(ip for record in records for ip in record.public_ips.values())


def _has_one_of(record: Record, addresses: Collection[IPAddress]) -> bool:
    return any(ip in addresses for ip in record.public_ips.values())
