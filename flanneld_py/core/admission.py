"""`admit` for one snapshot after another: what has not changed, and meets nothing that has, stays decided.

Two records have to do with each other only if their subnets overlap, or they share a MAC or an address. Those
that meet nobody are judged by themselves, once; the others are judged together, by the rules of `admit`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import NamedTuple

from flanneld_py.core.admit import Judge, Peers
from flanneld_py.model import Host, IPNetwork, NetworkConfig, Record, Snapshot

HOST = ""
"""Who holds what is the host's own, where others have the key of their record."""
FEW = 500
"""Changes that are worked into the order one by one; with more of them all is sorted anew."""
BITS = {4: 32, 6: 128}


class Admitted(NamedTuple):
    """What was decided, and how it differs from the last time."""

    peers: Peers
    added: tuple[Record, ...]
    removed: tuple[Record, ...]
    afresh: bool
    """The difference is not told: all was judged anew, or some of it shares something with others."""


class Admission:
    """Decides what `admit` would."""

    def __init__(self) -> None:
        self._context: tuple[Record, NetworkConfig, Host, str] | None = None
        self._judge: Judge | None = None
        self._spare = {4: 0, 6: 0}
        """IP version → the bits that the largest subnet leaves: two that overlap are equal without them."""
        self._forget()

    def _forget(self) -> None:
        self._records: Mapping[str, Record] = {}
        """Of the last snapshot."""
        self._gone: Mapping[str, Record] = {}
        """Those that had left the registry then."""
        self._known: dict[str, Record] = {}
        """Of both, all that were judged."""
        self._holders: dict[Hashable, str | set[str]] = {}
        """Subnet, MAC or address → the key of the one who has it, or the keys of several."""
        self._crowd: set[str] = set()
        """Keys of those that share something."""
        self._together = Peers()
        """What was decided about these."""
        self._alone: dict[str, Record] = {}
        """The accepted ones of the others."""
        self._order: list[tuple[bool, int, str]] = []
        """Of these: whether it has left, its age, and its key; in the order of `admit`."""
        self._in_order: list[Record] = []
        self._rejected: dict[str, str] = {}
        """The others of the others."""
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
            self._begin(judge, {family: allowed.subnet_len for family, allowed in config.ranges.items()})
        gone = {r.key: r for r in departed if r.key not in snapshot.records and not judge.is_ours_departed(r)}
        changed = self._changed(snapshot, gone, judge)
        while (lengths := self._larger(changed.values(), judge)) is not None:
            afresh = True
            self._begin(judge, lengths)
            changed = self._changed(snapshot, gone, judge)
        self._records = snapshot.records
        return self._take(changed, gone, judge, afresh=afresh)

    def _begin(self, judge: Judge, lengths: Mapping[int, int]) -> None:
        """With nobody but the host itself; `lengths`: IP version → that of the largest subnet."""
        self._forget()
        own = judge.own
        nets = [*(own.subnets.values() if own is not None else ()), *(net for net, _ in judge.places)]
        for version, bits in BITS.items():
            longest = min((net.prefixlen for net in nets if net.version == version), default=bits)
            self._spare[version] = bits - min(longest, lengths.get(version, bits))
        macs = own.vtep_macs.values() if own is not None else ()
        self._holders = dict.fromkeys((*map(self._place, nets), *macs), HOST)

    def _place(self, net: IPNetwork) -> int:
        """The same for subnets that overlap; below 0 for IPv6."""
        place = int(net.network_address) >> self._spare[net.version]
        return place if net.version == 4 else -1 - place

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

    def _larger(self, records: Iterable[Record | None], judge: Judge) -> dict[int, int] | None:
        """The lengths of the largest subnets, if one is larger than all that were to be expected."""
        known = {version: bits - self._spare[version] for version, bits in BITS.items()}
        found = dict(known)
        for record in records:
            for version, net in record.subnets.items() if record is not None else ():
                if net.prefixlen < found[version] and record and judge.unusable(record) is None:
                    found[version] = net.prefixlen
        return found if found != known else None

    def _take(
        self, changed: Mapping[str, Record | None], gone: Mapping[str, Record], judge: Judge, *, afresh: bool
    ) -> Admitted:
        """Judge what has changed and whom it meets or met, and say what came of it."""
        doubtful = set(changed)
        sharing: set[str] = set()
        for record in [self._known.pop(key) for key in changed if key in self._known]:
            sharing |= self._withdraw(record)
        for fresh in changed.values():
            if fresh is not None:
                self._enter(fresh, sharing)
        doubtful |= sharing
        before = {key: (self._alone.pop(key), key in self._gone) for key in doubtful if key in self._alone}
        self._gone = gone
        crowd = {key for key in sharing if key in self._known and self._meets(self._known[key])}
        met = bool(crowd) or not self._crowd.isdisjoint(doubtful)
        self._crowd = (self._crowd - doubtful) | crowd
        for key in doubtful:
            self._rejected.pop(key, None)
            if key in self._known and key not in crowd:
                self._judge_alone(self._known[key], judge)
        after = {key: (self._alone[key], key in gone) for key in doubtful if key in self._alone}
        self._reorder(before, after)
        if met:
            found = [self._known[key] for key in self._crowd]
            self._together = judge.decide(
                [record for record in found if record.key not in gone],
                [record for record in found if record.key in gone],
            )
        if changed or afresh:
            self._peers = self._put_together()
        return Admitted(
            self._peers,
            tuple(
                record
                for key, (record, _) in after.items()
                if key not in before or before[key][0] is not record
            ),
            tuple(
                record
                for key, (record, _) in before.items()
                if key not in after or after[key][0] is not record
            ),
            afresh or met,
        )

    def _withdraw(self, record: Record) -> set[str]:
        """Free what it had; the keys of those who shared that with it."""
        met: set[str] = set()
        for thing in self._things(record):
            holders = self._holders.get(thing)
            if isinstance(holders, set):
                holders.discard(record.key)
                met |= holders
                if len(holders) == 1:
                    self._holders[thing] = holders.pop()
            elif holders == record.key:
                del self._holders[thing]
        return met - {HOST}

    def _enter(self, record: Record, sharing: set[str]) -> None:
        """Take what it has, and add to `sharing` those who share some of it, itself among them."""
        key, holding = record.key, self._holders
        self._known[key] = record
        for thing in self._things(record):
            holders = holding.setdefault(thing, key)
            if holders is key:
                continue
            if isinstance(holders, str):
                holders = holding[thing] = {holders}
            holders.add(key)
            sharing |= holders - {HOST}

    def _meets(self, record: Record) -> bool:
        """Whether it shares something."""
        return any(not isinstance(self._holders[thing], str) for thing in self._things(record))

    def _things(self, record: Record) -> list[Hashable]:
        """All that it has that another may have, too: subnets as int, MACs as str, addresses as bytes."""
        v4, address = record.subnets.v4, record.public_ips.v4
        things: list[Hashable] = [*record.vtep_macs.values()]
        if v4 is not None:
            things.append(int(v4.network_address) >> self._spare[4])
        if address is not None:
            things.append(address.packed)
        if record.subnets.v6 is not None:
            things.append(self._place(record.subnets.v6))
        if record.public_ips.v6 is not None:
            things.append(record.public_ips.v6.packed)
        return things

    def _judge_alone(self, record: Record, judge: Judge) -> None:
        vacant = judge.is_vacant(record)
        reason = judge.unusable(record) or (None if vacant else judge.unfit(record))
        if reason is not None:
            self._rejected[record.key] = reason
        elif not vacant:
            self._alone[record.key] = record

    def _reorder(
        self, before: Mapping[str, tuple[Record, bool]], after: Mapping[str, tuple[Record, bool]]
    ) -> None:
        if len(before) + len(after) > FEW:
            self._order = sorted(_age(record, gone=key in self._gone) for key, record in self._alone.items())
            self._in_order = [self._alone[key] for _, _, key in self._order]
            return
        for record, gone in before.values():
            place = bisect_left(self._order, _age(record, gone=gone))
            del self._order[place], self._in_order[place]
        for record, gone in after.values():
            age = _age(record, gone=gone)
            place = bisect_left(self._order, age)
            self._order.insert(place, age)
            self._in_order.insert(place, record)

    def _put_together(self) -> Peers:
        accepted, together, gone = self._in_order, self._together, self._gone
        if together.accepted:
            accepted = sorted(
                (*accepted, *together.accepted), key=lambda record: _age(record, gone=record.key in gone)
            )
        rejected = {key: reason for key, reason in self._rejected.items() if key not in gone}
        return Peers(tuple(accepted), {**rejected, **together.rejected}, together.doubtful)


def _same(
    one: tuple[Record, NetworkConfig, Host, str], other: tuple[Record, NetworkConfig, Host, str]
) -> bool:
    return all(a is b for a, b in zip(one[:3], other[:3], strict=True)) and one[3] == other[3]


def _age(record: Record, *, gone: bool) -> tuple[bool, int, str]:
    return gone, record.create_revision, record.key
