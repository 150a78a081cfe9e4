"""When a lease is renewed, when its owner counts as gone, and when it is written again for Go flannel."""

from __future__ import annotations

from msgspec import Struct

from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.core.reservation import is_vacant
from flanneld_py.model import Record, Snapshot

RENEW_AT_MOST_EVERY = 300.0
MISSED = 3
"""Renewals in a row that a host may fail to make before it counts as gone."""
PUT_SPREAD = 0.1
"""Of the time between two puts, up or down, so that a fleet does not write at once."""
HEAL_AFTER, HEAL_WITHIN, HEAL_FOR_EACH = 5.0, 30.0, 0.3
"""Seconds after a record that Go flannel cannot read, from … to …: its hosts have dropped their peers. With
more than a hundred hosts so many seconds for each, as each of these puts wakes all the others."""
HEAL_AT_MOST_EVERY = 600.0


def renew_interval(ttl: float) -> float:
    """Seconds between KeepAlives: often enough to survive two lost ones, rare enough for a large fleet."""
    return min(ttl / 3, RENEW_AT_MOST_EVERY)


def silent_in(left: float, granted: float) -> float:
    """Seconds until the owner of an etcd lease counts as gone, if it does not renew; 0: it does now.

    Args:
        left: seconds the lease has left; negative when it has ended.
        granted: seconds it has just after a renewal, whatever we would have asked for.
    """
    if left < 0:
        return 0.0
    return max(0.0, left - (granted - MISSED * renew_interval(granted)))


# --- writing again --------------------------------------------------------------------------------


class Puts(Struct, frozen=True):
    """What is known of our writes, on one clock."""

    since: float
    """When our record was last written, or, if later, when the first Go flannel host was seen."""
    unreadable_since: float | None = None
    """When a record came that Go flannel cannot read; None when our last write was after it."""
    healed: float | None = None
    """When we last wrote because of one."""


def heal_in(spread: float, hosts: int) -> float:
    """Seconds from an unreadable record to our put; `spread` and `hosts` as for `next_put`."""
    return HEAL_AFTER + (max(HEAL_WITHIN, HEAL_FOR_EACH * hosts) - HEAL_AFTER) * spread


def next_put(puts: Puts, policy: LeasePolicy, ttl: int, spread: float, hosts: int = 0) -> float:
    """When our record is to be written again, unchanged, while a Go flannel host is in the registry.

    Such a host sets its peers right only when their records are written: it takes back what somebody removed
    from its kernel, and what it has itself removed at a record that it could not read, no sooner than that.

    Args:
        puts: what has been written when.
        policy: what the operator wants.
        ttl: seconds granted to our lease; 0: it is a reservation.
        spread: uniform in [0, 1), another number for each host and each put.
        hosts: how many have a record.
    """
    lifetime = ttl or policy.ttl
    period = max(lifetime - policy.renew_margin, lifetime / 2)
    regular = puts.since + period * (1 - PUT_SPREAD + 2 * PUT_SPREAD * spread)
    if puts.unreadable_since is None:
        return regular
    heal = puts.unreadable_since + heal_in(spread, hosts)
    if puts.healed is not None:
        heal = max(heal, puts.healed + HEAL_AT_MOST_EVERY)
    return min(regular, heal)


def has_go_hosts(snapshot: Snapshot, backend_type: str) -> bool:
    """Whether some record was written by a host that gives no node id, as Go flannel does not."""
    return any(
        not record.node_id and not is_vacant(record, backend_type) for record in snapshot.records.values()
    )


def is_contested(own: Record, snapshot: Snapshot) -> bool:
    """Whether another record has a VTEP MAC or public address of ours.

    Of two such records the one that was written first counts: by writing ours again we would yield.
    """
    macs, addresses = {*own.vtep_macs.values()}, {*own.public_ips.values()}
    return any(
        not macs.isdisjoint(record.vtep_macs.values()) or not addresses.isdisjoint(record.public_ips.values())
        for record in snapshot.records.values()
        if record.key != own.key and not is_vacant(record, own.backend_type)
    )
