"""Reservations: records without an etcd lease, which never end. Some wait for a host that is yet to come."""

from __future__ import annotations

from flanneld_py.addresses import Family, IPAddress, PerFamily, Subnets
from flanneld_py.core.records import format_key, parse_key, why_unreachable
from flanneld_py.errors import RecordError
from flanneld_py.model import NetworkConfig, Record, Snapshot

_FLAG: dict[Family, str] = {4: "--public-ip", 6: "--public-ipv6"}


def is_vacant(record: Record, backend_type: str) -> bool:
    """Whether it is a reservation that no host has taken yet: nothing is published for any backend.

    `backend_type` is what records of the network bear; where they bear none, such a one cannot be told.
    """
    nothing = not record.backend_type and not record.backend_data.values()
    return nothing and not record.etcd_lease and backend_type != ""


def plan_reservation(
    config: NetworkConfig,
    snapshot: Snapshot,
    subnets: Subnets,
    public_ips: PerFamily[IPAddress],
    node_id: str,
) -> Record:
    """The record to write for a host to come, or the one that stands and is to lose its etcd lease.

    Raises:
        RecordError: it would be of no use, or harm somebody; the text says whom.
    """
    wanted = Record(format_key(subnets), subnets, public_ips, node_id=node_id)
    standing = snapshot.records.get(wanted.key)
    if standing is not None:
        _check_same_host(standing, wanted)
        return standing
    for family in (4, 6):
        _check_family(family, wanted, config)
    _check_free(wanted, snapshot)
    return wanted


def _check_same_host(standing: Record, wanted: Record) -> None:
    """Addresses and id may be left out for a record that stands; given, they must be those in it."""
    given = wanted.public_ips.values()
    same = all(ip in standing.public_ips.values() for ip in given)
    if not same or wanted.node_id not in ("", standing.node_id):
        raise RecordError(
            f"{standing.key} is held by {owner_of(standing)}: give that address and node id to reserve it "
            "for that host, or release it first (flannelctl leases release)"
        )


def _check_family(family: Family, wanted: Record, config: NetworkConfig) -> None:
    allowed, subnet = config.ranges.get(family), wanted.subnets.get(family)
    public, flag = wanted.public_ips.get(family), _FLAG[family]
    if allowed is None:
        if subnet is not None or public is not None:
            raise RecordError(f"IPv{family} is not enabled in the network config: leave out {subnet or flag}")
        return
    if subnet is None:
        raise RecordError(
            f"IPv{family} is enabled in the network config: give a subnet of {allowed.network} as well"
        )
    if subnet.prefixlen != allowed.subnet_len:
        raise RecordError(f"{subnet}: expected a /{allowed.subnet_len}, the length of every host's subnet")
    if subnet.network_address not in allowed.network:
        raise RecordError(f"{subnet}: expected a subnet of the Network {allowed.network}")
    if public is None:
        raise RecordError(f"{flag} is missing: expected the address of the host that is to have {subnet}")
    reason = why_unreachable(public)
    if reason is None and public in allowed.network:
        reason = f"inside the Network {allowed.network}"
    if reason is not None:
        raise RecordError(f"{flag} {public} is {reason}: expected one at which other hosts reach the host")


def _check_free(wanted: Record, snapshot: Snapshot) -> None:
    for record in sorted(snapshot.records.values(), key=lambda record: record.key):
        if _overlap(wanted.subnets, record.subnets):
            raise RecordError(
                f"{_text(wanted.subnets)} overlaps {record.key}, which {owner_of(record)} holds"
            )
        for address in wanted.public_ips.values():
            if address in record.public_ips.values():
                raise RecordError(
                    f"{address} holds {record.key} already: reserve that for it (flannelctl leases reserve "
                    f"{_text(record.subnets)}), or release it first"
                )
    for key in sorted(snapshot.bad):
        try:
            subnets = parse_key(key)
        except RecordError:
            continue
        if _overlap(wanted.subnets, subnets):
            raise RecordError(
                f"{_text(wanted.subnets)} overlaps {key}, which cannot be read: delete that key"
            )


def owner_of(record: Record) -> str:
    """`192.0.2.7 (node id …)`."""
    addresses = " and ".join(map(str, record.public_ips.values()))
    return f"{addresses} (node id {record.node_id})" if record.node_id else addresses


def _overlap(one: Subnets, other: Subnets) -> bool:
    return any(
        net.version == theirs.version and net.overlaps(theirs)
        for net in one.values()
        for theirs in other.values()
    )


def _text(subnets: Subnets) -> str:
    return " ".join(map(str, subnets.values()))
