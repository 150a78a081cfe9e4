"""`admit` for one snapshot after another: what has not changed, and meets nothing that has, stays decided.

Two records have to do with each other only if their subnets overlap, or they share a MAC or an address. What
has changed is decided together with all that it meets, met before, or reaches over others, by the rules of
`admit`; who meets nobody is judged by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import NamedTuple

from flanneld_py.core.admit import Judge, Peers
from flanneld_py.core.meetings import Meetings
from flanneld_py.model import Host, NetworkConfig, Record, Snapshot

FEW = 500
"""Changes that are worked into the order one by one; with more of them all is sorted anew."""


class Admitted(NamedTuple):
    """What was decided, and how it differs from the last time."""

    peers: Peers
    added: tuple[Record, ...]
    removed: tuple[Record, ...]
    afresh: bool
    """The difference is not told: all was judged anew, or some of it shares an address with others."""


class Admission:
    """Decides what `admit` would."""

    def __init__(self) -> None:
        self._context: tuple[Record, NetworkConfig, Host, str] | None = None
        self._judge: Judge | None = None
        self._forget()

    def _forget(self, judge: Judge | None = None) -> None:
        self._records: Mapping[str, Record] = {}
        """Of the last snapshot."""
        self._gone: Mapping[str, Record] = {}
        """Those that had left the registry then."""
        self._known: dict[str, Record] = {}
        """Of both, all that were judged."""
        self._hopeless: dict[str, str] = {}
        """Those that are left out whoever else is there, and why: they meet nobody."""
        self._meetings = Meetings(*judge.host_has) if judge else Meetings((), ())
        self._accepted: dict[str, Record] = {}
        self._rejected: dict[str, str] = {}
        self._doubtful: dict[str, str] = {}
        self._order: list[tuple[bool, int, str]] = []
        """Of the accepted: whether it has left, its age, and its key; in the order of `admit`."""
        self._in_order: list[Record] = []
        self._peers = Peers()

    def admit(
        self,
        snapshot: Snapshot,
        own: Record,
        config: NetworkConfig,
        host: Host,
        backend_type: str,
        departed: Collection[Record] = (),
    ) -> Admitted:
        """What `admit` makes of the same arguments. Records that are the same objects have not changed."""
        context, judge, afresh = (own, config, host, backend_type), self._judge, False
        if judge is None or self._context is None or not _same(context, self._context):
            judge = self._judge = Judge(own, config, host, backend_type)
            self._context, afresh = context, True
            self._forget(judge)
        gone = {r.key: r for r in departed if r.key not in snapshot.records and not judge.is_ours_departed(r)}
        changed = self._changed(snapshot, gone, judge)
        self._records = snapshot.records
        return self._take(changed, gone, judge, afresh=afresh)

    def _changed(
        self, snapshot: Snapshot, gone: Mapping[str, Record], judge: Judge
    ) -> dict[str, Record | None]:
        """Key → the record to judge under it now, if any, where that is not as it was."""
        records, before, since = snapshot.records, self._records, snapshot.since
        touched = [*self._gone.keys() | gone.keys()]
        if since is not None and since[0] is before:
            touched += since[1]
        else:
            touched += [key for key, record in records.items() if before.get(key) is not record]
            touched += before.keys() - records.keys()
        found: dict[str, Record | None] = {}
        for key in touched:
            living = records.get(key)
            record = gone.get(key) if living is None else None if judge.is_ours(living) else living
            if record is not self._known.get(key) or (key in gone) != (key in self._gone):
                found[key] = record
        return found

    def _take(
        self, changed: Mapping[str, Record | None], gone: Mapping[str, Record], judge: Judge, *, afresh: bool
    ) -> Admitted:
        """Judge what has changed and whom it meets or met, and say what came of it."""
        left: set[Hashable] = set()
        for record in [self._known.pop(key) for key in changed if key in self._known]:
            if self._hopeless.pop(record.key, None) is None:
                left |= self._meetings.part(record)
        meeting = {r.key for r in changed.values() if r is not None and self._enter(r, judge)}
        crowd = self._meetings.reach(meeting, left, self._known) if meeting or left else set()
        doubtful = crowd.union(changed)
        if afresh:
            self._gone = gone
            self._decide(doubtful, crowd, judge)
            self._sort()
            self._peers = self._put_together()
            return Admitted(self._peers, (), (), afresh)
        before = {key: (self._accepted[key], key in self._gone) for key in doubtful if key in self._accepted}
        self._gone = gone
        self._decide(doubtful, crowd, judge)
        after = {key: (self._accepted[key], key in gone) for key in doubtful if key in self._accepted}
        removed = {key: was for key, was in before.items() if not _equal(was, after.get(key))}
        added = {key: now for key, now in after.items() if not _equal(now, before.get(key))}
        self._reorder(removed, added)
        if changed:
            self._peers = self._put_together()
        come = [record for key, (record, _) in added.items() if _is_other(record, removed.get(key))]
        went = [record for key, (record, _) in removed.items() if _is_other(record, added.get(key))]
        afresh = any(map(self._meetings.shares_address, (*come, *went)))
        return Admitted(self._peers, tuple(come), tuple(went), afresh)

    def _enter(self, record: Record, judge: Judge) -> bool:
        """Whether it meets somebody."""
        self._known[record.key] = record
        reason = judge.hopeless(record)
        if reason is not None:
            self._hopeless[record.key] = reason
            return False
        return self._meetings.come(record)

    def _decide(self, doubtful: Iterable[str], crowd: Collection[str], judge: Judge) -> None:
        for key in doubtful:
            for decided in (self._accepted, self._rejected, self._doubtful):
                decided.pop(key, None)
            record = self._known.get(key)
            if record and key not in crowd and key not in self._hopeless and not judge.is_vacant(record):
                self._accepted[key] = record
        if crowd:
            found = [self._known[key] for key in crowd]
            together = judge.decide(
                [record for record in found if record.key not in self._gone],
                [record for record in found if record.key in self._gone],
            )
            self._accepted |= {record.key: record for record in together.accepted}
            self._rejected |= together.rejected
            self._doubtful |= together.doubtful

    def _reorder(
        self, removed: Mapping[str, tuple[Record, bool]], added: Mapping[str, tuple[Record, bool]]
    ) -> None:
        if len(removed) + len(added) > FEW:
            self._sort()
            return
        for record, gone in removed.values():
            place = bisect_left(self._order, _age(record, gone=gone))
            del self._order[place], self._in_order[place]
        for record, gone in added.values():
            age = _age(record, gone=gone)
            place = bisect_left(self._order, age)
            self._order.insert(place, age)
            self._in_order.insert(place, record)

    def _sort(self) -> None:
        """All of the accepted."""
        gone = self._gone
        ages = {(key in gone, record.create_revision, key): record for key, record in self._accepted.items()}
        self._order = sorted(ages)
        self._in_order = [ages[age] for age in self._order]

    def _put_together(self) -> Peers:
        hopeless = {key: reason for key, reason in self._hopeless.items() if key not in self._gone}
        return Peers(tuple(self._in_order), {**hopeless, **self._rejected}, self._doubtful.copy())


def _same(
    one: tuple[Record, NetworkConfig, Host, str], other: tuple[Record, NetworkConfig, Host, str]
) -> bool:
    return all(a is b for a, b in zip(one[:3], other[:3], strict=True)) and one[3] == other[3]


def _equal(one: tuple[Record, bool], other: tuple[Record, bool] | None) -> bool:
    return other is not None and one[0] is other[0] and one[1] == other[1]


def _is_other(record: Record, other: tuple[Record, bool] | None) -> bool:
    """Whether it is another record; not only that it stays for a moment now."""
    return other is None or other[0] is not record


def _age(record: Record, *, gone: bool) -> tuple[bool, int, str]:
    return gone, record.create_revision, record.key
