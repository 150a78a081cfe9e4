"""Peers whose record has vanished stay for a moment: mostly their host claims its subnet again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from flanneld_py.model import Record, Snapshot

RECLAIM_SECONDS = 2.0
"""For a record deleted or expired: its host, if it lives, sees that at the same moment as we do."""
RETURN_SECONDS = 60.0
"""For all records when etcd lost its data: each host has to notice and to connect anew."""
WIPE_SECONDS = 60.0
"""For many deleted at once: as many hosts claim at once, and hosts do not die in such numbers …"""
WIPE_LEAST, WIPE_SHARE = 3, 0.2
"""… that is, more of them than both this number and this share of all …"""
WIPE_WITHIN = 10.0
"""… in so many seconds."""


class Burst(NamedTuple):
    """Departures in succession, each while one before it is still kept."""

    began: float
    size: int


@dataclass(frozen=True, slots=True)
class Departed:
    """The last record of a peer that has none in the registry any more."""

    record: Record
    until: float
    """When it ceases to be a peer, on the clock that `departures` was given."""
    burst: Burst
    """As it was when this one left."""


def departures(
    earlier: Mapping[str, Departed], last: Snapshot | None, fresh: Snapshot, now: float
) -> dict[str, Departed]:
    """Key → the peers to keep although `fresh` lacks them, `last` being the snapshot before it.

    One that is in `fresh` is none of them, whoever holds the key now.
    """
    staying = {key: gone for key, gone in earlier.items() if gone.until > now}
    departed = {key: gone for key, gone in staying.items() if key not in fresh.records}
    if last is None or last is fresh:
        return departed
    leaving = last.records.keys() - fresh.records.keys()
    if not leaving:
        return departed
    if last.epoch != fresh.epoch:
        # Nobody has deleted these: they are no part of a burst.
        return departed | {k: Departed(last.records[k], now + RETURN_SECONDS, Burst(now, 0)) for k in leaving}
    before = max(
        (gone.burst for gone in staying.values() if gone.burst.began > now - WIPE_WITHIN),
        default=Burst(now, 0),
        key=lambda burst: burst.size,
    )
    burst = Burst(before.began, before.size + len(leaving))
    seconds = RECLAIM_SECONDS
    if burst.size > max(WIPE_LEAST, WIPE_SHARE * (len(last.records) + before.size)):
        seconds = WIPE_SECONDS
        departed = {k: replace(gone, until=max(gone.until, now + seconds)) for k, gone in departed.items()}
    return departed | {k: Departed(last.records[k], now + seconds, burst) for k in leaving}
