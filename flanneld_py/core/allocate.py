"""Which subnet this host leases: a pure decision over one snapshot of the registry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias, TypeVar

from flanneld_py.core.records import encode, format_key, parse_key
from flanneld_py.errors import RecordError
from flanneld_py.model import (
    FAMILIES,
    Family,
    Host,
    IPAddress,
    IPNetwork,
    NetworkConfig,
    PerFamily,
    Record,
    Snapshot,
    SubnetRange,
    Subnets,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Keep:
    """The record stands as it should; nothing to write."""

    record: Record


@dataclass(frozen=True, slots=True)
class Adopt:
    """Write `wanted` over `record`, the same key, guarded by its mod_revision."""

    record: Record
    wanted: Record


@dataclass(frozen=True, slots=True)
class Release:
    """Delete `record`, ours but unfit, guarded by its mod_revision; then decide again."""

    record: Record
    reason: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Create `wanted`, guarded by the key not existing."""

    wanted: Record


@dataclass(frozen=True, slots=True)
class Conflict:
    """Somebody else stands where we should; nothing is written while it lives."""

    record: Record
    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class Wait:
    """There is nothing to be had now."""

    reason: str
    fix: str


Decision: TypeAlias = Keep | Adopt | Release | Claim | Conflict | Wait


@dataclass(frozen=True, slots=True)
class Wish:
    """What this host brings to the decision besides its identity."""

    backend_type: str
    public_ips: PerFamily[IPAddress]
    backend_data: PerFamily[Any] = field(default_factory=PerFamily)
    previous: tuple[Subnets, ...] = ()
    """Subnets held before, most trusted first: in memory, state file, subnet.env."""
    etcd_lease: int = 0
    """The etcd lease of the last run; it proves that a record is ours after our address changed."""
    silent: frozenset[str] = frozenset()
    """Keys of records whose owner has stopped renewing."""

    def record(self, subnets: Subnets, node_id: str) -> Record:
        return Record(
            key=format_key(subnets),
            subnets=subnets,
            # Of no other family: it would not be read back, and so be written again and again.
            public_ips=_of_families(subnets, self.public_ips),
            backend_type=self.backend_type,
            backend_data=_of_families(subnets, self.backend_data),
            node_id=node_id,
        )


def decide_lease(config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish, rng: Random) -> Decision:
    """What to do about our lease, given all of the registry at one revision."""
    for family in FAMILIES:
        if config.ranges.get(family) is not None and wish.public_ips.get(family) is None:
            return _no_address(family)
    mine = [record for record in snapshot.records.values() if record.node_id == host.node_id]
    if mine:
        return _decide_own(sorted(mine, key=_age), config, snapshot, host, wish)
    namesakes = [record for record in snapshot.records.values() if _names_us(record, wish)]
    if namesakes:
        return _decide_namesake(min(namesakes, key=_age), config, host, wish)
    unreadable = _unreadable(snapshot, config)
    for subnets in wish.previous:
        free = subnets not in unreadable and not _overlapping(subnets, snapshot.records.values())
        if free and _compatible(subnets, config):
            return Claim(wish.record(subnets, host.node_id))
    return _allocate(config, [*_leased(snapshot), *unreadable], host, wish, rng)


def find_own(snapshot: Snapshot, node_id: str) -> Record | None:
    """The oldest record of this node, if any."""
    mine = [record for record in snapshot.records.values() if record.node_id == node_id]
    return min(mine, key=_age, default=None)


def _decide_own(
    mine: Sequence[Record], config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish
) -> Decision:
    for record in mine:
        if not _is_ours(record, host, wish):
            return Conflict(
                record,
                f"node id {host.node_id} is also used by {_addresses(record)}, which holds {record.key}",
                "give each host its own --node-id (cloned machines share /etc/machine-id)",
            )
    first, *others = mine
    if not _compatible(first.subnets, config):
        return Release(first, f"{first.key} does not fit the network config")
    older = _overlapping(
        first.subnets, (r for r in snapshot.records.values() if _age(r) < _age(first) and r.key != first.key)
    )
    if older is not None:
        return Release(first, f"{first.key} overlaps the older lease {older.key} of {_addresses(older)}")
    if others:
        return Release(others[0], f"{others[0].key} is a second lease of this host beside {first.key}")
    return _keep_or_adopt(first, host, wish)


def _decide_namesake(record: Record, config: NetworkConfig, host: Host, wish: Wish) -> Decision:
    """A record that names our public address under no node id (Go flannel's) or under another one."""
    migrating = not record.node_id and (not wish.previous or record.subnets in wish.previous)
    if migrating or record.key in wish.silent:
        if not _compatible(record.subnets, config):
            return Release(record, f"{record.key} does not fit the network config")
        return _keep_or_adopt(record, host, wish)
    owner = f"node id {record.node_id}" if record.node_id else "a node without id"
    return Conflict(
        record,
        f"public address {_addresses(record)} is already published by {owner}, which holds {record.key}",
        "set --iface or --public-ip so that each host publishes its own address, or remove the record if "
        "that host is gone",
    )


def _keep_or_adopt(record: Record, host: Host, wish: Wish) -> Decision:
    wanted = wish.record(record.subnets, host.node_id)
    return Keep(record) if encode(wanted) == encode(record) else Adopt(record, wanted)


def _is_ours(record: Record, host: Host, wish: Wish) -> bool:
    if wish.etcd_lease and record.etcd_lease == wish.etcd_lease:
        return True
    addresses = {*host.local_addresses, *wish.public_ips.values()}
    return record.key in wish.silent or any(ip in addresses for ip in record.public_ips.values())


def _names_us(record: Record, wish: Wish) -> bool:
    return any(
        record.public_ips.get(family) is not None
        and record.public_ips.get(family) == wish.public_ips.get(family)
        for family in FAMILIES
    )


def _compatible(subnets: Subnets, config: NetworkConfig) -> bool:
    return all(_fits(subnets.get(family), config.ranges.get(family)) for family in FAMILIES)


def _fits(subnet: IPNetwork | None, allowed: SubnetRange | None) -> bool:
    if subnet is None or allowed is None:
        return subnet is None and allowed is None
    base = int(subnet.network_address)
    return subnet.prefixlen == allowed.subnet_len and int(allowed.subnet_min) <= base <= int(
        allowed.subnet_max
    )


def _overlapping(subnets: Subnets, records: Iterable[Record]) -> Record | None:
    for record in records:
        for family, subnet in subnets.items():
            other = record.subnets.get(family)
            if other is not None and other.overlaps(subnet):
                return record
    return None


def _leased(snapshot: Snapshot) -> Iterator[Subnets]:
    return (record.subnets for record in snapshot.records.values())


def _unreadable(snapshot: Snapshot, config: NetworkConfig) -> list[Subnets]:
    """Subnets that we might lease, but for a value we cannot read: somebody may hold them all the same."""
    found: list[Subnets] = []
    for key in snapshot.bad.keys() - snapshot.records.keys():
        with suppress(RecordError):
            found.append(parse_key(key))
    return [subnets for subnets in found if _compatible(subnets, config)]


def _allocate(
    config: NetworkConfig, stored: Sequence[Subnets], host: Host, wish: Wish, rng: Random
) -> Decision:
    """A random free subnet of each family, over the whole range; `stored` has a key each."""
    chosen: dict[int, IPNetwork] = {}
    for family, allowed in config.ranges.items():
        leased = [subnets.get(family) for subnets in stored]
        taken = [net for net in (*leased, *host.local_networks) if net is not None]
        subnet = random_free(allowed, taken, rng)
        if subnet is None:
            return _none_free(allowed, sum(net is not None for net in leased))
        chosen[family] = subnet
    return Claim(wish.record(PerFamily(v4=chosen.get(4), v6=chosen.get(6)), host.node_id))


def _no_address(family: Family) -> Wait:
    return Wait(
        f"IPv{family} is enabled in the network config, but this host has no IPv{family} address to publish",
        f"give the external interface an IPv{family} address, choose another --iface, or set "
        f"EnableIPv{family} to false",
    )


def _none_free(allowed: SubnetRange, leased: int) -> Wait:
    total = _count(allowed)
    return Wait(
        f"no free subnet: {allowed.network} gives {total} subnets of /{allowed.subnet_len} "
        f"({allowed.subnet_min} to {allowed.subnet_max}), {leased} leases stand and the rest overlaps this "
        f"host's own networks",
        "release leases of hosts that are gone (flannelctl leases), or widen Network or SubnetMax",
    )


def random_free(allowed: SubnetRange, taken: Iterable[IPNetwork], rng: Random) -> IPNetwork | None:
    """One of the subnets of `allowed` that overlap nothing in `taken`, each with equal chance.

    O(n log n) in the number of taken networks, whatever the size of the range.
    """
    gaps = list(_gaps(allowed, taken))
    free = sum(last - first + 1 for first, last in gaps)
    if not free:
        return None
    pick = rng.randrange(free)
    for first, last in gaps:
        if pick <= last - first:
            return _subnet(allowed, first + pick)
        pick -= last - first + 1
    raise AssertionError("pick lies within the free subnets")


def _gaps(allowed: SubnetRange, taken: Iterable[IPNetwork]) -> Iterator[tuple[int, int]]:
    """Runs of free subnets, as first and last index from subnet_min."""
    shift = allowed.network.max_prefixlen - allowed.subnet_len
    origin = int(allowed.subnet_min) >> shift
    used = sorted(
        (
            (int(net.network_address) >> shift) - origin,
            (int(net.broadcast_address) >> shift) - origin,
        )
        for net in taken
        if net.version == allowed.network.version
    )
    free_from = 0
    for first, last in used:
        if first > free_from:
            yield free_from, min(first, _count(allowed)) - 1
        free_from = max(free_from, last + 1)
        if free_from >= _count(allowed):
            return
    yield free_from, _count(allowed) - 1


def _count(allowed: SubnetRange) -> int:
    shift = allowed.network.max_prefixlen - allowed.subnet_len
    return ((int(allowed.subnet_max) - int(allowed.subnet_min)) >> shift) + 1


def _subnet(allowed: SubnetRange, index: int) -> IPNetwork:
    shift = allowed.network.max_prefixlen - allowed.subnet_len
    base = int(allowed.subnet_min) + (index << shift)
    return type(allowed.network)((base, allowed.subnet_len))


def _of_families(subnets: Subnets, values: PerFamily[T]) -> PerFamily[T]:
    return PerFamily(
        v4=None if subnets.v4 is None else values.v4,
        v6=None if subnets.v6 is None else values.v6,
    )


def _addresses(record: Record) -> str:
    return " and ".join(str(ip) for ip in record.public_ips.values()) or "a host without address"


def _age(record: Record) -> tuple[int, str]:
    return record.create_revision, record.key
