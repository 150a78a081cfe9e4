"""Which subnet this host leases: a pure decision over one snapshot of the registry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias, TypeVar

from flanneld_py.core.records import encode, format_key, parse_key
from flanneld_py.core.subnets import leasable
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
    """The etcd lease that this machine held in its last run: proof after its address has changed."""
    held: Record | None = None
    """What this process holds; rewritten by somebody else with our node id it is a clone's."""
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
    ours = sorted((record for record in mine if _is_ours(record, host, wish)), key=_age)
    if ours:
        return _decide_own(ours, config, snapshot, host, wish)
    if mine:
        return _cloned(min(mine, key=_age), host)
    namesakes = [record for record in snapshot.records.values() if _names_us(record, wish)]
    if namesakes:
        return _decide_namesake(min(namesakes, key=_age), config, host, wish)
    taken = _taken(snapshot, config)
    for subnets in wish.previous:
        if _compatible(subnets, config) and not any(_overlap(subnets, other) for other in taken):
            return Claim(wish.record(subnets, host.node_id))
    return _allocate(config, taken, host, wish, rng)


def find_own(snapshot: Snapshot, host: Host, wish: Wish) -> Record | None:
    """The oldest record that is ours, if any."""
    mine = (record for record in snapshot.records.values() if record.node_id == host.node_id)
    return min((record for record in mine if _is_ours(record, host, wish)), key=_age, default=None)


def _decide_own(
    ours: Sequence[Record], config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish
) -> Decision:
    first, *others = ours
    if not _compatible(first.subnets, config):
        return Release(first, f"{first.key} does not fit the network config")
    older = _older_overlap(first, snapshot, config)
    if older is not None:
        return Release(first, f"{first.key} overlaps the older lease {older.key} of {_addresses(older)}")
    if others:
        return Release(others[0], f"{others[0].key} is a second lease of this host beside {first.key}")
    rival = _rival(first, snapshot, wish)
    return _address_conflict(rival) if rival is not None else _keep_or_adopt(first, host, wish)


def _rival(own: Record, snapshot: Snapshot, wish: Wish) -> Record | None:
    """Another host that published our address before we did."""
    since = own.mod_revision if own.public_ips == wish.record(own.subnets, "").public_ips else None
    rivals = (
        record
        for record in snapshot.records.values()
        if record.node_id not in ("", own.node_id)
        and _names_us(record, wish)
        and record.key not in wish.silent
        and (since is None or record.mod_revision < since)
    )
    return min(rivals, key=_age, default=None)


def _older_overlap(own: Record, snapshot: Snapshot, config: NetworkConfig) -> Record | None:
    """Who had a lease in our way before we took ours; one that was changed since may have been anything."""
    in_the_way = (
        record
        for record in snapshot.records.values()
        if record.key != own.key
        and record.mod_revision < own.create_revision
        and _may_be_leased(record.subnets, config)
        and _overlap(own.subnets, record.subnets)
    )
    return min(in_the_way, key=_age, default=None)


def _cloned(record: Record, host: Host) -> Conflict:
    return Conflict(
        record,
        f"node id {host.node_id} is also used by {_addresses(record)}, which holds {record.key}",
        "give each host its own --node-id (cloned machines share /etc/machine-id and --state-dir)",
    )


def _decide_namesake(record: Record, config: NetworkConfig, host: Host, wish: Wish) -> Decision:
    """A record that names our public address under no node id (Go flannel's) or under another one."""
    migrating = not record.node_id and (not wish.previous or record.subnets in wish.previous)
    if migrating or record.key in wish.silent:
        if not _compatible(record.subnets, config):
            return Release(record, f"{record.key} does not fit the network config")
        return _keep_or_adopt(record, host, wish)
    return _address_conflict(record)


def _address_conflict(record: Record) -> Conflict:
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
    """Whether a record with our node id was written by this host: machines are cloned, ids and all."""
    addresses = {*host.local_addresses, *host.external.public.values()}
    if record.key in wish.silent or any(ip in addresses for ip in record.public_ips.values()):
        return True
    if wish.held is not None:
        return record.key == wish.held.key and record.mod_revision == wish.held.mod_revision
    return bool(wish.etcd_lease) and record.etcd_lease == wish.etcd_lease


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


def _overlap(one: Subnets, other: Subnets) -> bool:
    return any(
        net.version == theirs.version and net.overlaps(theirs)
        for net in one.values()
        for theirs in other.values()
    )


def _may_be_leased(subnets: Subnets, config: NetworkConfig) -> bool:
    """Whether they can have come from the Network at all; what cannot keeps nobody out."""
    return any(
        (allowed := config.ranges.get(family)) is not None and leasable(subnet, allowed.network)
        for family, subnet in subnets.items()
    )


def _taken(snapshot: Snapshot, config: NetworkConfig) -> list[Subnets]:
    """Subnets that have a key: leased, or with a value we cannot read and held all the same, perhaps."""
    found = [record.subnets for record in snapshot.records.values()]
    for key in snapshot.bad.keys() - snapshot.records.keys():
        with suppress(RecordError):
            found.append(parse_key(key))
    return [subnets for subnets in found if _may_be_leased(subnets, config)]


def _allocate(
    config: NetworkConfig, keys: Sequence[Subnets], host: Host, wish: Wish, rng: Random
) -> Decision:
    """A random free subnet of each family, over the whole range; `keys` are taken."""
    chosen: dict[int, IPNetwork] = {}
    for family, allowed in config.ranges.items():
        leased = [subnets.get(family) for subnets in keys]
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
