"""Peers whose record has vanished stay for a moment: mostly their host claims its subnet again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flanneld_py.model import Record, Snapshot

RECLAIM_SECONDS = 2.0
"""For a record deleted or expired: its host, if it lives, sees that at the same moment as we do."""
RETURN_SECONDS = 60.0
"""For all records when etcd lost its data: each host has to notice and to connect anew."""


@dataclass(frozen=True, slots=True)
class Departed:
    """The last record of a peer that has none in the registry any more."""

    record: Record
    until: float
    """When it ceases to be a peer, on the clock that `departures` was given."""


def departures(
    earlier: Mapping[str, Departed], last: Snapshot | None, fresh: Snapshot, now: float
) -> dict[str, Departed]:
    """Key → the peers to keep although `fresh` lacks them, `last` being the snapshot before it.

    One that is in `fresh` is none of them, whoever holds the key now.
    """
    departed = {key: gone for key, gone in earlier.items() if gone.until > now and key not in fresh.records}
    if last is None or last is fresh:
        return departed
    replaced = last.cluster_id != fresh.cluster_id or last.revision > fresh.revision
    until = now + (RETURN_SECONDS if replaced else RECLAIM_SECONDS)
    for key in last.records.keys() - fresh.records.keys():
        departed[key] = Departed(last.records[key], until)
    return departed
