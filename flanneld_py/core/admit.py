"""Which records may become peers: what one node publishes must not harm the others' traffic."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flanneld_py.model import Host, IPNetwork, NetworkConfig, Record, Snapshot


@dataclass(frozen=True, slots=True)
class Peers:
    """The records to program, and why the others are not."""

    accepted: tuple[Record, ...] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)


def admit(
    snapshot: Snapshot,
    own: Record,
    config: NetworkConfig,
    host: Host,
    backend_type: str,
    departed: Collection[Record] = (),
) -> Peers:
    """Screen all records but our own, oldest first: of two that clash the older one stays.

    `departed`, records that have just left the registry, come last, and silently. Linear in the number of
    records.
    """
    accepted: list[Record] = []
    rejected: dict[str, str] = {}
    # Ours may be lost, and then not among them.
    taken = SubnetIndex(
        subnet
        for record in (own, *snapshot.records.values(), *departed)
        for subnet in record.subnets.values()
    )
    taken.add(own)
    macs = dict.fromkeys(own.vtep_macs.values(), own.key)
    gone = [
        r for r in departed if r.key not in snapshot.records and (not r.node_id or r.node_id != own.node_id)
    ]
    for record in (*sorted(snapshot.records.values(), key=_age), *sorted(gone, key=_age)):
        if record.key == own.key:
            continue
        reason = (
            _unusable(record, own, config, host, backend_type)
            or taken.clash(record)
            or _mac_clash(record, macs)
        )
        if reason:
            if record.key in snapshot.records:
                rejected[record.key] = reason
            continue
        taken.add(record)
        macs.update((mac, record.key) for mac in record.vtep_macs.values())
        accepted.append(record)
    return Peers(tuple(accepted), rejected)


class SubnetIndex:
    """Overlap queries over subnets of few different lengths, each O(number of lengths)."""

    def __init__(self, universe: Iterable[IPNetwork]) -> None:
        """`universe`: all subnets that will ever be asked for; it gives the lengths in use."""
        self._lengths: dict[int, list[int]] = {4: [], 6: []}
        for version, length in {(net.version, net.prefixlen) for net in universe}:
            self._lengths[version].append(length)
        self._exact: dict[tuple[int, int, int], str] = {}
        """(version, length, base) → key of the record that holds it."""
        self._above: dict[tuple[int, int, int], str] = {}
        """The same for every shorter length in use: who holds something inside it."""

    def add(self, record: Record) -> None:
        for net in record.subnets.values():
            base = int(net.network_address)
            for length in self._lengths[net.version]:
                index = self._exact if length == net.prefixlen else self._above
                if length <= net.prefixlen:
                    index.setdefault((net.version, length, _masked(base, length, net)), record.key)

    def clash(self, record: Record) -> str | None:
        """Why `record` cannot stand beside those added, or None."""
        for net in record.subnets.values():
            holder = self._holder(net)
            if holder is not None:
                return f"subnet {net} overlaps the older lease {holder}"
        return None

    def _holder(self, net: IPNetwork) -> str | None:
        base = int(net.network_address)
        inside = self._above.get((net.version, net.prefixlen, base))
        if inside is not None:
            return inside
        for length in self._lengths[net.version]:
            if length <= net.prefixlen:
                holder = self._exact.get((net.version, length, _masked(base, length, net)))
                if holder is not None:
                    return holder
        return None


def _age(record: Record) -> tuple[int, str]:
    return record.create_revision, record.key


def _masked(base: int, length: int, net: IPNetwork) -> int:
    shift = net.max_prefixlen - length
    return base >> shift << shift


def _unusable(
    record: Record, own: Record, config: NetworkConfig, host: Host, backend_type: str
) -> str | None:
    for family, subnet in record.subnets.items():
        scope = config.ranges.get(family)
        if scope is None or own.subnets.get(family) is None:
            continue
        if not (subnet.prefixlen >= scope.network.prefixlen and subnet.network_address in scope.network):
            return f"subnet {subnet} lies outside the Network {scope.network}"
        public = record.public_ips.get(family)
        if public is None:
            return f"subnet {subnet} comes without a public IPv{family} address"
        if public in scope.network:
            return f"public address {public} lies inside the Network {scope.network}: it could not be reached"
        if public in host.local_addresses or public == host.external.public.get(family):
            return f"public address {public} is this host's own"
    if record.backend_type != backend_type:
        return f"backend is {record.backend_type or 'udp or alloc'}, this host's is {backend_type}"
    return None


def _mac_clash(record: Record, macs: Mapping[str, str]) -> str | None:
    for mac in record.vtep_macs.values():
        if mac in macs:
            return f"VTEP MAC {mac} belongs to the older lease {macs[mac]}"
    return None
