"""Which records may become peers: what one node publishes must not harm the others' traffic."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import ip_network

from msgspec import Struct, field

from flanneld_py.addresses import Family, IPAddress, IPNetwork
from flanneld_py.core.records import age, said_since
from flanneld_py.core.reservation import is_vacant
from flanneld_py.core.subnets import leasable
from flanneld_py.model import Host, NetworkConfig, Record, Snapshot

OUTSIDE, OTHER_BACKEND = "lies outside the Network", "backend is"
"""In the reasons for which a record is left out: its host goes by another config."""


class Peers(Struct, frozen=True):
    """The records to program, and why the others are not. All mappings are by key."""

    accepted: tuple[Record, ...] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)
    doubtful: Mapping[str, str] = field(default_factory=dict)
    """What is odd about accepted ones that harm nobody but themselves."""


def admit(
    snapshot: Snapshot,
    own: Record | None,
    config: NetworkConfig,
    host: Host | None,
    backend_type: str,
    departed: Collection[Record] = (),
) -> Peers:
    """Screen all records but our own, oldest first: of two that overlap the older one stays.

    Of two with one MAC it is the one that was written first, as a MAC may be changed at any time. A network
    or address of the host itself, its gateways and etcd stay reachable as they are. A record that is bad in
    one family is left out as a whole: half a peer would be harder to explain than none. A peer's public
    address needs no rule of its own: none lies inside the Network, and no subnet outside. `departed`, records
    that have just left the registry, come last, and silently. Linear in the number of records.

    Args:
        snapshot: all records.
        own: our lease. None, with `host`: judge without being one of the hosts.
        config: the config in force.
        host: this host.
        backend_type: as our backend publishes it.
        departed: peers that stay for a moment.
    """
    judge = Judge(own, config, host, backend_type)
    living = [record for record in snapshot.records.values() if not judge.is_ours(record)]
    gone = [r for r in departed if r.key not in snapshot.records and not judge.is_ours_departed(r)]
    return judge.decide(living, gone)


class Judge:
    """The rules of `admit` for one host, of which some concern a record alone."""

    def __init__(
        self, own: Record | None, config: NetworkConfig, host: Host | None, backend_type: str
    ) -> None:
        self.places = [] if own is None or host is None else list(_places_of_host(own, config, host))
        """What is the host's own, and what is wrong with a subnet that meets it."""
        self.own = own
        self._backend_type = backend_type
        self._here = _here(own, config, host, backend_type)

    def is_ours(self, record: Record) -> bool:
        """Whether it is no other host's.

        One with our node id and an address of this host is ours too: the one that we are about to hold, or
        have held.
        """
        if self.own is None:
            return False
        return record.key == self.own.key or (
            record.node_id == self.own.node_id
            and record.node_id != ""
            and any(ip in self._here.addresses for ip in record.public_ips.values())
        )

    def is_ours_departed(self, record: Record) -> bool:
        """The same of one that has left the registry."""
        return self.own is not None and record.node_id != "" and record.node_id == self.own.node_id

    @property
    def host_has(self) -> tuple[list[IPNetwork], list[str]]:
        """Subnets and MACs that no peer can have."""
        own = self.own
        nets = [*(own.subnets.values() if own is not None else ()), *(net for net, _ in self.places)]
        return nets, [*own.vtep_macs.values()] if own is not None else []

    def hopeless(self, record: Record) -> str | None:
        """Why it cannot be a peer of this host, whoever else is there."""
        reason = _unusable(record, self._here)
        return reason or (None if self.is_vacant(record) else _unfit(record, self._here))

    def is_vacant(self, record: Record) -> bool:
        """A reservation that waits for its host keeps its subnet, and there is nobody to reach."""
        return is_vacant(record, self._backend_type)

    def decide(self, living: Collection[Record], gone: Collection[Record]) -> Peers:
        """Which of these records become peers, in any order of them."""
        own_subnets = () if self.own is None else self.own.subnets.values()
        universe = (net for record in (*living, *gone) for net in record.subnets.values())
        taken = SubnetIndex([*universe, *own_subnets, *(net for net, _ in self.places)])
        if self.own is not None:
            # It may be lost, and then not among the others.
            taken.add(own_subnets, f"overlaps our own lease {self.own.key}")
        for net, conflict in self.places:
            taken.add([net], conflict)
        holders: list[Record] = []
        rejected: dict[str, str] = {}
        for record in (*sorted(living, key=age), *sorted(gone, key=age)):
            reason = self.hopeless(record) or taken.clash(record)
            if reason is not None:
                rejected.setdefault(record.key, reason)
                continue
            taken.add(record.subnets.values(), f"overlaps the older lease {record.key}")
            if not self.is_vacant(record):
                holders.append(record)
        left = {record.key for record in gone}
        macs = _first_macs(holders, left, self.own)
        rejected |= {r.key: clash for r in holders if (clash := _mac_clash(r, macs))}
        accepted = tuple(record for record in holders if record.key not in rejected)
        known = {key: reason for key, reason in rejected.items() if key not in left}
        return Peers(accepted, known, _shared_addresses(accepted, left))


class SubnetIndex:
    """Overlap queries over subnets of few different lengths, each O(number of lengths)."""

    def __init__(self, universe: Iterable[IPNetwork]) -> None:
        """`universe`: all subnets that will ever be asked for; it gives the lengths in use."""
        self._lengths: dict[int, list[int]] = {4: [], 6: []}
        for version, length in {(net.version, net.prefixlen) for net in universe}:
            self._lengths[version].append(length)
        self._exact: dict[tuple[int, int, int], str] = {}
        """(version, length, base) → what it would do to whom."""
        self._above: dict[tuple[int, int, int], str] = {}
        """The same for every shorter length in use, for something inside it."""

    def add(self, networks: Iterable[IPNetwork], conflict: str) -> None:
        """`conflict`: what is wrong with a subnet that meets these, as it continues "subnet …"."""
        for net in networks:
            base = int(net.network_address)
            for length in self._lengths[net.version]:
                index = self._exact if length == net.prefixlen else self._above
                if length <= net.prefixlen:
                    index.setdefault((net.version, length, _masked(base, length, net)), conflict)

    def clash(self, record: Record) -> str | None:
        """Why `record` cannot stand beside those added, or None."""
        for net in record.subnets.values():
            conflict = self._conflict(net)
            if conflict is not None:
                return f"subnet {net} {conflict}"
        return None

    def _conflict(self, net: IPNetwork) -> str | None:
        base = int(net.network_address)
        for length in self._lengths[net.version]:
            if length <= net.prefixlen:
                conflict = self._exact.get((net.version, length, _masked(base, length, net)))
                if conflict is not None:
                    return conflict
        return self._above.get((net.version, net.prefixlen, base))


def _masked(base: int, length: int, net: IPNetwork) -> int:
    shift = net.max_prefixlen - length
    return base >> shift << shift


class _Here(Struct, frozen=True):
    """Where a record would have to fit in."""

    scopes: Mapping[Family, IPNetwork]
    """The Network of each family in use."""
    backend_type: str
    whose: str = "the config's"
    others: Mapping[IPAddress, str] = field(default_factory=dict)
    """What no peer can have as its public address → whose it is: the host's, or everybody's (RFC 919)."""
    addresses: frozenset[IPAddress] = frozenset()
    """The host's."""


def _here(own: Record | None, config: NetworkConfig, host: Host | None, backend_type: str) -> _Here:
    scopes = {
        family: allowed.network
        for family, allowed in config.ranges.items()
        if own is None or own.subnets.get(family) is not None
    }
    if host is None:
        return _Here(scopes, backend_type)
    nets = [net for net in host.local_networks if net.version == 4 and net.prefixlen < 31]
    # Not what a flag wants to be published, should another host hold that yet.
    addresses = host.local_addresses.union(own.public_ips.values() if own is not None else ())
    others: dict[IPAddress, str] = dict.fromkeys(addresses, "this host's own")
    for net in nets:
        others.setdefault(net.broadcast_address, f"the broadcast address of {net}")
    return _Here(scopes, backend_type, "this host's", others, addresses)


def _unusable(record: Record, here: _Here) -> str | None:
    """Why no host could have it as a peer."""
    for family, scope in here.scopes.items():
        subnet, public = record.subnets.get(family), record.public_ips.get(family)
        if subnet is None:
            continue
        if not leasable(subnet, scope):
            where = "is too large for the Network" if _within(subnet, scope) else OUTSIDE
            return f"subnet {subnet} {where} {scope}"
        if public is None:
            return f"subnet {subnet} comes without a public IPv{family} address"
        if public in scope:
            return f"public address {public} lies inside the Network {scope}: it could not be reached"
    return None


def _unfit(record: Record, here: _Here) -> str | None:
    """Why this host cannot have it as a peer."""
    for family in here.scopes:
        public = record.public_ips.get(family)
        if public is not None and public in here.others:
            return f"public address {public} is {here.others[public]}"
    if record.backend_type != here.backend_type and (record.backend_type, here.backend_type) != ("udp", ""):
        # flannel's udp writes no type, and takes records of any.
        whose = f"{here.whose} is {here.backend_type or 'udp or alloc'}"
        return f"{OTHER_BACKEND} {record.backend_type or 'udp or alloc'}, {whose}"
    return None


def _places_of_host(own: Record, config: NetworkConfig, host: Host) -> Iterator[tuple[IPNetwork, str]]:
    """What a peer's subnet must not cover, and the conflict if it does, but for those of our own pods.

    Networks of the host inside the Network, such as a bridge's, and addresses that must stay reachable.
    """
    addresses = (
        ("this host's address", host.local_addresses),
        ("this host's gateway", host.gateways),
        ("the etcd endpoint", host.registry),
    )
    places = [(net, f"overlaps this host's own network {net}") for net in host.local_networks]
    places += [
        (ip_network(ip), f"contains {what} {ip}") for what, ips in addresses for ip in sorted(ips, key=str)
    ]
    for net, conflict in places:
        inside = any(_within(net, network) for network in config.networks)
        if inside and not any(_within(net, subnet) for subnet in own.subnets.values()):
            yield net, conflict


def _within(inner: IPNetwork, outer: IPNetwork) -> bool:
    return (
        inner.version == outer.version
        and inner.prefixlen >= outer.prefixlen
        and inner.network_address in outer
    )


def _first_macs(holders: Iterable[Record], left: Collection[str], own: Record | None) -> dict[str, str]:
    """MAC → key of the record that published it first, the living before the departed; ours stays ours."""
    macs = {} if own is None else dict.fromkeys(own.vtep_macs.values(), own.key)
    for record in sorted(holders, key=lambda r: (r.key in left, said_since(r), r.key)):
        for mac in record.vtep_macs.values():
            macs.setdefault(mac, record.key)
    return macs


def _mac_clash(record: Record, macs: Mapping[str, str]) -> str | None:
    for mac in record.vtep_macs.values():
        if macs[mac] != record.key:
            return f"VTEP MAC {mac} belongs to the lease {macs[mac]}"
    return None


def _shared_addresses(accepted: Iterable[Record], left: Collection[str]) -> dict[str, str]:
    """Key of the younger → what it shares with whom.

    Both stay: it may be one host with two leases, and of two behind one NAT the younger may be the one that
    can be reached.
    """
    first: dict[IPAddress, str] = {}
    shared: dict[str, str] = {}
    for record in accepted:
        if record.key not in left:
            for public in record.public_ips.values():
                holder = first.setdefault(public, record.key)
                if holder != record.key:
                    shared[record.key] = f"public address {public} is also that of the older lease {holder}"
    return shared
