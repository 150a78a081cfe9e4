"""Which records meet: their subnets overlap, or they have a MAC or a public address in common.

To come, to part and to ask cost the same among ten thousand as among ten, however large some subnets are.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping

from flanneld_py.addresses import IPNetwork
from flanneld_py.model import Record

HOST = ""
"""Who has what is the host's own, where others have the key of their record."""


class Meetings:
    """Things that a record has are ints for subnets, str for MACs, bytes for addresses.

    A negative int stands for what lies inside the subnet that its complement stands for.
    """

    def __init__(self, nets: Iterable[IPNetwork], macs: Iterable[str]) -> None:
        """`nets`, `macs`: the host's own, which never go."""
        self._holders: dict[Hashable, str | set[str]] = dict.fromkeys(macs, HOST)
        """Thing → the key of the one who has it, or the keys of several."""
        self._inside: dict[int, set[str]] = {}
        """Subnet of a length in use → keys of those with smaller ones in it."""
        self._shorter: dict[tuple[int, int], tuple[int, ...]] = {}
        """IP version and length of a subnet in use → the shorter lengths in use."""
        for net in nets:
            self._add(_block(net, net.prefixlen), HOST)
            self._stand_inside(net, HOST)

    def come(self, record: Record) -> bool:
        """Note what it has; whether somebody has some of it, too."""
        key, met = record.key, False
        for net in record.subnets.values():
            block = _block(net, net.prefixlen)
            met = self._add(block, key) or met
            met = self._stand_inside(net, key) or block in self._inside or met
        for thing in _without_subnets(record):
            met = self._add(thing, key) or met
        return met

    def part(self, record: Record) -> set[Hashable]:
        """Forget it; things of whose holders it met some, or which nobody has any more."""
        key = record.key
        for thing in dict.fromkeys(_things(record)):
            holders = self._holders[thing]
            if isinstance(holders, str):
                del self._holders[thing]
            else:
                holders.discard(key)
                if len(holders) == 1:
                    (self._holders[thing],) = holders
        for net in record.subnets.values():
            for length in self._shorter[net.version, net.prefixlen]:
                block = _block(net, length)
                self._inside[block].discard(key)
                if not self._inside[block]:
                    del self._inside[block]
        return {thing for thing in self._reached_from(record) if self._of(thing)}

    def reach(
        self, keys: Iterable[str], things: Iterable[Hashable], records: Mapping[str, Record]
    ) -> set[str]:
        """These keys, those of who has these things, and of all whom they meet, over others as well."""
        found: set[str] = set()
        seen = set(things)
        pending = [*keys, *(key for thing in seen for key in self._of(thing))]
        while pending:
            key = pending.pop()
            if key == HOST or key in found:
                continue
            found.add(key)
            for thing in self._reached_from(records[key]):
                if thing not in seen:
                    seen.add(thing)
                    pending += self._of(thing)
        return found

    def shares_address(self, record: Record) -> bool:
        """Whether another one has a public address of this one, which may be there or not."""
        return any(set(self._of(ip.packed)) - {record.key} for ip in record.public_ips.values())

    def _of(self, thing: Hashable) -> Collection[str]:
        if isinstance(thing, int) and thing < 0:
            return self._inside.get(~thing, ())
        holders = self._holders.get(thing, ())
        return (holders,) if isinstance(holders, str) else holders

    def _add(self, thing: Hashable, key: str) -> bool:
        """Whether another one has it, too."""
        holders = self._holders.setdefault(thing, key)
        if holders is key:
            return False
        if isinstance(holders, str):
            holders = self._holders[thing] = {holders}
        holders.add(key)
        return True

    def _stand_inside(self, net: IPNetwork, key: str) -> bool:
        """Whether another one has a larger subnet around it."""
        form = net.version, net.prefixlen
        if form not in self._shorter:
            self._learn(*form)
        met = False
        for length in self._shorter[form]:
            block = _block(net, length)
            self._inside.setdefault(block, set()).add(key)
            met = block in self._holders or met
        return met

    def _learn(self, version: int, length: int) -> None:
        """From now on subnets of this length are in use."""
        lengths = [other for family, other in self._shorter if family == version]
        for thing in [thing for thing in self._holders if isinstance(thing, int)]:
            other = thing >> 1 & 0xFF
            if thing & 1 == (version == 6) and other > length:
                around = _encode(thing >> 9 >> other - length, length, version)
                self._inside.setdefault(around, set()).update(self._of(thing))
        self._shorter[version, length] = tuple(other for other in lengths if other < length)
        for other in lengths:
            if other > length:
                self._shorter[version, other] = (*self._shorter[version, other], length)

    def _reached_from(self, record: Record) -> list[Hashable]:
        """All things whose holders it meets, whether it is there or not."""
        things = _things(record)
        for net in record.subnets.values():
            things.append(~_block(net, net.prefixlen))
            things += [_block(net, length) for length in self._shorter[net.version, net.prefixlen]]
        return things


def _things(record: Record) -> list[Hashable]:
    """All that it has that another may have, too."""
    blocks: list[Hashable] = [_block(net, net.prefixlen) for net in record.subnets.values()]
    return blocks + _without_subnets(record)


def _without_subnets(record: Record) -> list[Hashable]:
    return [*record.vtep_macs.values(), *[ip.packed for ip in record.public_ips.values()]]


def _block(net: IPNetwork, length: int) -> int:
    """The subnet of this length around it."""
    return _encode(int(net.network_address) >> net.max_prefixlen - length, length, net.version)


def _encode(place: int, length: int, version: int) -> int:
    return place << 9 | length << 1 | (version == 6)
