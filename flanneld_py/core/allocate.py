"""Which subnet this host leases: a pure decision over one snapshot of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from random import Random

from msgspec.structs import replace

from flanneld_py.addresses import FAMILIES, Family, IPAddress, PerFamily, Subnets
from flanneld_py.core.leasedecision import (
    Adopt,
    Claim,
    Conflict,
    Decision,
    End,
    Keep,
    Move,
    Release,
    Rename,
    Restore,
    Wait,
    Wish,
)
from flanneld_py.core.leaseproof import is_left, is_migrating, is_ours, is_proven, may_take, names_us, near_us
from flanneld_py.core.records import age, encode, parse_key, said_since
from flanneld_py.core.reservation import is_vacant
from flanneld_py.core.subnetchoice import (
    Around,
    claim,
    fitting,
    is_compatible,
    may_be_leased,
    overlap,
    per_family,
    previous_subnets,
    taken_besides,
    taken_subnets,
)
from flanneld_py.errors import RecordError
from flanneld_py.model import Host, NetworkConfig, Record, Snapshot


def decide_lease(config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish, rng: Random) -> Decision:
    """What to do about our lease, given all of the registry at one revision."""
    near = near_us(snapshot, host, wish)
    ours = _own_records(config, near, host, wish)
    for family in FAMILIES:
        if config.ranges.get(family) is not None and wish.public_ips.get(family) is None:
            return _no_address(family, ours[0] if ours else None)
    if ours:
        return _decide_own(ours, near, config, snapshot, host, wish, rng)
    lost = _decide_missing(config, snapshot, host, wish)
    if lost is not None:
        return lost
    twins = _twins(near, host, wish)
    if twins:
        return _cloned(twins[0], host, wish)
    namesake = _namesake(config, near, host, wish)
    if namesake is not None:
        return _decide_namesake(namesake, config, snapshot, host, wish, rng)
    taken = taken_subnets(snapshot, config)
    return claim(config, taken, host, wish, rng, previous_subnets(config, taken, wish))


def find_own(config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish) -> Record | None:
    """The record that we hold or would take up, if any: peers know us by what it says."""
    near = near_us(snapshot, host, wish)
    ours = _own_records(config, near, host, wish)
    if ours:
        return ours[0]
    namesake = _namesake(config, near, host, wish)
    return namesake if namesake is not None and may_take(namesake, wish) else None


def _no_address(family: Family, own: Record | None) -> Wait:
    return Wait(
        f"IPv{family} is enabled in the network config, but this host has no IPv{family} address to publish",
        f"give the external interface an IPv{family} address, choose another --iface, or set "
        f"EnableIPv{family} to false",
        own,
    )


# --- whose record it is ---------------------------------------------------------------------------


def _own_records(config: NetworkConfig, near: Sequence[Record], host: Host, wish: Wish) -> list[Record]:
    """Ours, the one to keep first.

    A reservation that waits for us counts only when there is nothing else: a host that holds a subnet keeps
    it. One that fits the config in nothing stays where it is, as it is not ours to delete.
    """
    found = [record for record in near if is_ours(record, host, wish)]
    found = [r for r in found if r.etcd_lease or fitting(r.subnets, config, reserved=True)]
    held = [record for record in found if not is_vacant(record, wish.backend_type)]
    return sorted(held or found, key=lambda record: (not is_compatible(record, config), *age(record)))


def _twins(near: Sequence[Record], host: Host, wish: Wish) -> list[Record]:
    """Other hosts' records with our node id, oldest first."""
    mine = (record for record in near if record.node_id == host.node_id)
    return sorted((record for record in mine if not is_ours(record, host, wish)), key=age)


def _cloned(record: Record, host: Host, wish: Wish) -> Rename | Conflict:
    reason = f"node id {host.node_id} is also used by {_addresses(record)}, which holds {record.key}"
    if not wish.fixed_id:
        return Rename(record, reason)
    return Conflict(
        record,
        reason,
        "give each host its own --node-id (cloned machines share /etc/machine-id and --state-dir)",
    )


# --- what we hold ---------------------------------------------------------------------------------


def _decide_own(
    ours: Sequence[Record],
    near: Sequence[Record],
    config: NetworkConfig,
    snapshot: Snapshot,
    host: Host,
    wish: Wish,
    rng: Random,
) -> Decision:
    first, *others = ours
    fits = is_compatible(first, config)
    older = _older_overlap(ours, snapshot, config, wish) if fits else None
    if older is not None:
        return _yield(first, older)
    surplus = next((record for record in others if record.etcd_lease), None)
    if surplus is not None:
        return Release(surplus, f"{surplus.key} is a second lease of this host beside {first.key}")
    if not fits:
        return refit(first, config, snapshot, host, wish, rng)
    rivals = _rivals(first, near, wish)
    if rivals and not _may_follow(first, rivals, host, wish):
        held = None if is_vacant(first, wish.backend_type) else first
        return replace(_address_conflict(rivals[0], wish), held=held)
    twins = _twins(near, host, wish)
    if twins and twins[0].create_revision < first.create_revision and not wish.fixed_id:
        return _cloned(twins[0], host, wish)
    if wish.held is not None and _is_outlived(first, wish.held, config, snapshot):
        found: Decision = Move(first, wish.record(wish.held.subnets, host.node_id))
    else:
        found = _keep_or_adopt(first, host, wish)
    return found


def _is_outlived(own: Record, held: Record, config: NetworkConfig, snapshot: Snapshot) -> bool:
    """Whether our record is of a time before the lease that this process holds, which nobody else has.

    Etcd was restored from a backup: containers have addresses of the lease that it does not know.
    """
    return (
        own.etcd_lease != 0
        and held.key not in snapshot.records
        and is_compatible(replace(held, etcd_lease=own.etcd_lease), config)
        and not any(map(Around(held.subnets).meets, taken_besides(own, snapshot, config)))
    )


def _yield(own: Record, other: Record) -> Release | Conflict:
    """Of two that overlap one must go; which reservation goes, is the operator's to say."""
    if own.etcd_lease:
        return Release(own, _overlap_text(own, other))
    return _reserved_twice(own, other)


def _reserved_twice(own: Record, other: Record) -> Conflict:
    reason = f"the reservation {_overlap_text(own, other)}"
    return Conflict(other, reason, "release one of the two: flannelctl leases release")


def _overlap_text(own: Record, other: Record) -> str:
    return f"{own.key} overlaps the older lease {other.key} of {_addresses(other)}"


def refit(
    record: Record, config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish, rng: Random
) -> Move | Wait | Conflict:
    """A record that does not fit the config keeps the subnet of the families in which it does.

    It stays until another can be had in its place: peers reach us by it.
    """
    kept = fitting(record.subnets, config, reserved=not record.etcd_lease)
    for other in snapshot.records.values():
        if other.key == record.key or not may_be_leased(other.subnets, config):
            continue
        free = {f: net for f, net in kept.items() if not overlap(per_family({f: net}), other.subnets)}
        if len(free) < len(kept) and not record.etcd_lease:
            return _reserved_twice(record, other)
        kept = free
    taken = taken_besides(record, snapshot, config)
    found = claim(config, taken, host, wish, rng, kept or previous_subnets(config, taken, wish))
    if isinstance(found, Claim):
        return Move(record, found.wanted, is_left(record, wish))
    return replace(found, held=record)


def _rivals(own: Record, near: Sequence[Record], wish: Wish) -> list[Record]:
    """Other hosts that published our address before we did, oldest first."""
    since = said_since(own) if own.public_ips == _published(own, wish) else None
    rivals = (
        record
        for record in near
        if record.node_id not in ("", own.node_id)
        and names_us(record, wish)
        and record.key not in wish.silent
        and not is_vacant(record, wish.backend_type)
        and (since is None or said_since(record) < since)
        and not is_proven(record, wish)
    )
    return sorted(rivals, key=age)


def _may_follow(own: Record, rivals: Sequence[Record], host: Host, wish: Wish) -> bool:
    """Whether our record is to name another address, though it be one that other hosts still publish.

    Each of two hosts that have swapped their addresses finds its own still published by the other one, and
    one of them must begin. A host that has left its address loses nothing by saying so; one that still has
    it, or is only told another one by a flag, stays reachable where it is.
    """
    there = _published(own, wish)
    changed = [f for f in FAMILIES if own.public_ips.get(f) != there.get(f)]
    contested = [f for f in changed if any(r.public_ips.get(f) == there.get(f) for r in rivals)]
    here = host.local_addresses
    return bool(changed) and all(
        there.get(f) in here and own.public_ips.get(f) not in here for f in contested
    )


def _published(own: Record, wish: Wish) -> PerFamily[IPAddress]:
    """The addresses that our record should name."""
    return wish.record(own.subnets, own.node_id).public_ips


def _older_overlap(
    ours: Sequence[Record], snapshot: Snapshot, config: NetworkConfig, wish: Wish
) -> Record | None:
    """Who had a lease in our way before we took ours; one that was changed since may have been anything.

    But while ours is a claim of which nothing was made yet, any older one counts: its host has not seen ours
    in its way, and would not yield either.
    """
    own, keys = ours[0], {record.key for record in ours}
    held, written = wish.held, wish.written
    is_claim = written is not None and written.key == own.key and (held is None or held.key != own.key)
    around = Around(own.subnets)
    in_the_way = (
        record
        for record in snapshot.records.values()
        if record.key not in keys
        and (record.create_revision if is_claim else said_since(record)) < own.create_revision
        and around.meets(record.subnets)
        and may_be_leased(record.subnets, config)
    )
    return min(in_the_way, key=age, default=None)


def _keep_or_adopt(record: Record, host: Host, wish: Wish) -> Decision:
    wanted = wish.record(record.subnets, host.node_id)
    return Keep(record) if encode(wanted) == encode(record) else Adopt(record, wanted, is_left(record, wish))


# --- what we have lost ----------------------------------------------------------------------------


def _decide_missing(config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish) -> Decision | None:
    """When our record is not there; None: another subnet may be had."""
    garbled = _garbled(config, snapshot, host, wish)
    if garbled is not None or wish.held is None or not is_compatible(wish.held, config):
        return garbled
    return _decide_lost(wish.held, config, snapshot, host, wish)


def _decide_lost(
    held: Record, config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish
) -> Decision | None:
    """When somebody else has the subnet that this process held: what the operator wants then.

    None: nobody has, or another subnet is to be claimed, or it is more than the subnet that is disputed.
    """
    around = Around(held.subnets)
    holders = (
        record
        for record in snapshot.records.values()
        if around.meets(record.subnets)
        and may_be_leased(record.subnets, config)
        and not (names_us(record, wish) and is_migrating(record, wish))
    )
    holder = min(holders, key=age, default=None)
    if holder is None:
        return _unreadable_holder(held, config, snapshot) if wish.on_loss == "hold" else None
    owner = f"node id {holder.node_id}" if holder.node_id else "a node without id"
    reason = f"our subnet {_text(held.subnets)} is now held by {_addresses(holder)} ({owner}, {holder.key})"
    match wish.on_loss:
        case "exit":
            return End(reason, "the data plane stays; start the daemon again to lease another subnet")
        case "hold" if not names_us(holder, wish) or holder.node_id == host.node_id:
            return Conflict(
                holder,
                reason,
                f"stop that host, then flannelctl leases release {holder.subnets.values()[0]} --force: it is "
                "claimed again; or restart this daemon to lease another subnet (--on-lease-loss renumber: by "
                "itself)",
            )
    return None


def _garbled(config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish) -> Restore | None:
    """Our record of this or the last run, when what somebody has written over it cannot be read.

    Hosts that could read it before keep us as their peer by it, and take us for somebody else elsewhere.
    """
    held = wish.held
    key, lease = (wish.last_key, wish.etcd_lease) if held is None else (held.key, held.etcd_lease)
    if not key or key not in snapshot.bad or key in snapshot.records or key in wish.foreign:
        return None
    wanted = replace(wish.record(parse_key(key), host.node_id), etcd_lease=lease)
    complete = all(wish.public_ips.get(family) is not None for family, _ in wanted.subnets.items())
    around = Around(wanted.subnets)
    disputed = any(
        around.meets(record.subnets) and may_be_leased(record.subnets, config)
        for record in snapshot.records.values()
    )
    return Restore(wanted) if complete and not disputed else None


def _unreadable_holder(held: Record, config: NetworkConfig, snapshot: Snapshot) -> Wait | None:
    for key in sorted(snapshot.bad.keys() - snapshot.records.keys()):
        with suppress(RecordError):
            subnets = parse_key(key)
            if overlap(subnets, held.subnets) and may_be_leased(subnets, config):
                return Wait(
                    f"our subnet {_text(held.subnets)} has a key in etcd, {key}, that cannot be read",
                    "delete that key: then it is claimed again; or restart this daemon to lease another",
                )
    return None


# --- our address in a record of another -----------------------------------------------------------


def _namesake(config: NetworkConfig, near: Sequence[Record], host: Host, wish: Wish) -> Record | None:
    """The oldest record that names our address; one that waits for a host only if there is no other."""
    found = [
        record
        for record in near
        if names_us(record, wish)
        # A reservation for us that cannot be used keeps us from nothing.
        and (
            record.etcd_lease
            or record.node_id not in ("", host.node_id)
            or fitting(record.subnets, config, reserved=True)
        )
    ]
    return min(found, key=lambda r: (is_vacant(r, wish.backend_type), *age(r)), default=None)


def _decide_namesake(
    record: Record, config: NetworkConfig, snapshot: Snapshot, host: Host, wish: Wish, rng: Random
) -> Decision:
    """A record that names our public address under no node id (Go flannel's) or under another one."""
    if may_take(record, wish):
        if not is_compatible(record, config):
            return refit(record, config, snapshot, host, wish, rng)
        return _keep_or_adopt(record, host, wish)
    return _address_conflict(record, wish)


def _address_conflict(record: Record, wish: Wish) -> Conflict:
    owner = f"node id {record.node_id}" if record.node_id else "a node without id"
    if is_vacant(record, wish.backend_type):
        return Conflict(
            record,
            f"{record.key} is reserved for our public address {_addresses(record)}, but for {owner}",
            f"start this daemon with --node-id {record.node_id}, or make the reservation anew for this host "
            "(flannelctl leases release, then reserve)",
        )
    return Conflict(
        record,
        f"public address {_addresses(record)} is already published by {owner}, which holds {record.key}",
        "set --iface or --public-ip so that each host publishes its own address, or remove the record if "
        "that host is gone (flannelctl leases release)",
    )


def _text(subnets: Subnets) -> str:
    return " and ".join(map(str, subnets.values()))


def _addresses(record: Record) -> str:
    return " and ".join(str(ip) for ip in record.public_ips.values()) or "a host without address"
