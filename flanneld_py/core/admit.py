"""Which records may become peers: what one node publishes must not harm the others' traffic."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flanneld_py.core.subnets import leasable
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
    """Screen all records but our own, oldest first: of two that overlap the older one stays.

    Of two with one MAC it is the one that was written first, as a MAC may be changed at any time. A network
    that the host itself is connected to stays the host's. `departed`, records that have just left the
    registry, come last, and silently. Linear in the number of records.
    """
    connected = _connected(own, config, host)
    records = (own, *snapshot.records.values(), *departed)
    taken = SubnetIndex([*(net for record in records for net in record.subnets.values()), *connected])
    # Ours may be lost, and then not among the others.
    taken.add(own.subnets.values(), f"our own lease {own.key}")
    for net in connected:
        taken.add([net], f"this host's own network {net}")
    gone = [
        r for r in departed if r.key not in snapshot.records and (not r.node_id or r.node_id != own.node_id)
    ]
    living = [r for r in snapshot.records.values() if r.key != own.key]
    holders: list[Record] = []
    rejected: dict[str, str] = {}
    for record in (*sorted(living, key=_age), *sorted(gone, key=_age)):
        reason = _unusable(record, own, config, host, backend_type) or taken.clash(record)
        if reason is None:
            taken.add(record.subnets.values(), f"the older lease {record.key}")
            holders.append(record)
        else:
            rejected.setdefault(record.key, reason)
    macs = _first_macs(holders, snapshot, own)
    rejected |= {r.key: clash for r in holders if (clash := _mac_clash(r, macs))}
    accepted = tuple(record for record in holders if record.key not in rejected)
    return Peers(accepted, {key: reason for key, reason in rejected.items() if key in snapshot.records})


class SubnetIndex:
    """Overlap queries over subnets of few different lengths, each O(number of lengths)."""

    def __init__(self, universe: Iterable[IPNetwork]) -> None:
        """`universe`: all subnets that will ever be asked for; it gives the lengths in use."""
        self._lengths: dict[int, list[int]] = {4: [], 6: []}
        for version, length in {(net.version, net.prefixlen) for net in universe}:
            self._lengths[version].append(length)
        self._exact: dict[tuple[int, int, int], str] = {}
        """(version, length, base) → who holds it."""
        self._above: dict[tuple[int, int, int], str] = {}
        """The same for every shorter length in use: who holds something inside it."""

    def add(self, networks: Iterable[IPNetwork], holder: str) -> None:
        for net in networks:
            base = int(net.network_address)
            for length in self._lengths[net.version]:
                index = self._exact if length == net.prefixlen else self._above
                if length <= net.prefixlen:
                    index.setdefault((net.version, length, _masked(base, length, net)), holder)

    def clash(self, record: Record) -> str | None:
        """Why `record` cannot stand beside those added, or None."""
        for net in record.subnets.values():
            holder = self._holder(net)
            if holder is not None:
                return f"subnet {net} overlaps {holder}"
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
        if not leasable(subnet, scope.network):
            where = "is too large for" if _within(subnet, scope.network) else "lies outside"
            return f"subnet {subnet} {where} the Network {scope.network}"
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


def _connected(own: Record, config: NetworkConfig, host: Host) -> list[IPNetwork]:
    """The host's own networks inside the Network, such as a bridge's, but for those of our own pods."""
    return [
        net
        for net in host.local_networks
        if any(_within(net, network) for network in config.networks)
        and not any(_within(net, subnet) for subnet in own.subnets.values())
    ]


def _within(inner: IPNetwork, outer: IPNetwork) -> bool:
    return (
        inner.version == outer.version
        and inner.prefixlen >= outer.prefixlen
        and inner.network_address in outer
    )


def _first_macs(holders: Iterable[Record], snapshot: Snapshot, own: Record) -> dict[str, str]:
    """MAC → key of the record that published it first, the living before the departed; ours stays ours."""
    macs: dict[str, str] = dict.fromkeys(own.vtep_macs.values(), own.key)
    for record in sorted(holders, key=lambda r: (r.key not in snapshot.records, r.mod_revision, r.key)):
        for mac in record.vtep_macs.values():
            macs.setdefault(mac, record.key)
    return macs


def _mac_clash(record: Record, macs: Mapping[str, str]) -> str | None:
    for mac in record.vtep_macs.values():
        if macs[mac] != record.key:
            return f"VTEP MAC {mac} belongs to the lease {macs[mac]}"
    return None
