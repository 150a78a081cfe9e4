"""The values that flow between the parts. All are frozen and compared by value.

Addresses are `ipaddress` objects of either family, devices are names (only the kernel drivers know indexes).
IPv6 is more rows in the same tables, not other tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple, TypeAlias

from msgspec import Struct, field

from flanneld_py.addresses import Family, IPAddress, IPInterface, IPNetwork, PerFamily, Subnets
from flanneld_py.datapath import Endpoint, PumpSettings, TunLink
from flanneld_py.packetfilter import Chain, ChainKey
from flanneld_py.values import PartlyCompared

# --- registry -------------------------------------------------------------------------------------


class SubnetRange(Struct, frozen=True):
    """The Network of one family and the subnets that may be leased from it."""

    network: IPNetwork
    subnet_len: int
    subnet_min: IPAddress
    """Base of the first subnet handed out."""
    subnet_max: IPAddress
    """Base of the last subnet handed out (inclusive)."""


class NetworkConfig(PartlyCompared, frozen=True):
    """`P/config`, checked and with its defaults filled in."""

    compared = 5

    ranges: PerFamily[SubnetRange]
    backend_type: str
    """Lower case; a name that is no known backend is refused by whoever looks it up."""
    backend_options: Mapping[str, Any]
    """The other keys of `Backend`, lower-cased, values as JSON gave them."""
    nftables: bool = False
    unknown_keys: tuple[str, ...] = ()
    """Top-level keys that mean nothing, as the user spelled them."""
    option_spelling: Mapping[str, str] = field(default_factory=dict)
    """Keys of `Backend`, lower-cased → as the user spelled them."""
    doubts: tuple[str, ...] = ()
    """What else is hardly meant as it stands, a line each."""

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        return tuple(r.network for r in self.ranges.values())

    @property
    def network_of(self) -> PerFamily[IPNetwork]:
        return PerFamily(*(r.network if r else None for r in (self.ranges.v4, self.ranges.v6)))

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(family for family, _ in self.ranges.items())


class Entry(Struct, frozen=True):
    """One key of etcd below the prefix, as read."""

    key: str
    """Relative to the prefix: `config`, `subnets/10.5.34.0-24`. Undecodable bytes are escaped."""
    value: bytes
    create_revision: int = 0
    mod_revision: int = 0
    etcd_lease: int = 0
    """0: stored without an etcd lease, that is for ever."""


class Listing(Struct, frozen=True):
    """Everything below the prefix at one revision."""

    revision: int
    cluster_id: int
    entries: tuple[Entry, ...]


class Fingerprint(NamedTuple):
    """Of everything below the prefix at one revision: two histories of etcd hardly share it."""

    keys: int
    """How many there are."""
    newest: int
    """The highest mod_revision among them, 0 for none."""

    def __str__(self) -> str:
        return f"{self.keys} keys, the newest of {self.newest}"


class Change(Struct, frozen=True):
    """One watch event: a put (`entry` set) or a delete (`entry` None)."""

    key: str
    entry: Entry | None


class Changes(Struct, frozen=True):
    """The events of one watch response; `revision` is where a later watch may resume after."""

    revision: int
    changes: tuple[Change, ...]


class Record(PartlyCompared, frozen=True):
    """A lease's value with its key: who holds which subnet and how to reach it."""

    compared = 10

    key: str
    """Last part of the etcd key: `10.5.34.0-24`."""
    subnets: Subnets
    public_ips: PerFamily[IPAddress]
    backend_type: str = ""
    """Lower case; empty for udp and alloc."""
    backend_data: PerFamily[Any] = field(default_factory=PerFamily)
    """Decoded JSON of BackendData and BackendV6Data."""
    vtep_macs: PerFamily[str] = field(default_factory=PerFamily)
    """For vxlan: VtepMAC of each family in canonical form (`82:4b:b1:2c:8f:a1`)."""
    node_id: str = ""
    """Empty for a node that publishes none, such as Go flannel."""
    create_revision: int = 0
    mod_revision: int = 0
    etcd_lease: int = 0
    since_revision: int = 0
    """mod_revision of the first put that we know to have said the same; 0: as `mod_revision`. A Go node
    writes its record anew at each renewal, and is none the younger for it."""


class Snapshot(PartlyCompared, frozen=True):
    """All records at one revision. Immutable; replaced as a whole."""

    compared = 5

    revision: int
    cluster_id: int
    records: Mapping[str, Record] = field(default_factory=dict)
    bad: Mapping[str, str] = field(default_factory=dict)
    """Key → why it was left out."""
    epoch: int = 0
    """Grows when etcd lost the history known before: it was wiped, or restored from a backup."""
    unreadable: int = 0
    """Revision of the last write of something unreadable, or of its end, as far as we have seen; 0: none."""
    since: tuple[Mapping[str, Record], frozenset[str]] | None = None
    """The records of the snapshot before, and the keys under which there is another one now, or none."""


# --- host -----------------------------------------------------------------------------------------


class AddressFacts(Struct, frozen=True):
    """One address on an interface, as the kernel lists it."""

    address: IPInterface
    scope: Literal["global", "link", "host", "site"] = "global"
    deprecated: bool = False
    permanent: bool = True
    secondary: bool = False


class LinkFacts(Struct, frozen=True):
    """One interface of the host, as the kernel lists it."""

    name: str
    index: int
    mtu: int
    mac: str
    up: bool
    carrier: bool = True
    """Whether its lower layer carries anything (IFF_LOWER_UP)."""
    kind: str = ""
    """`vxlan`, `veth`, `bridge`, … or empty for hardware and loopback."""
    alias: str = ""
    addresses: tuple[AddressFacts, ...] = ()


class Way(NamedTuple):
    """How the kernel sends packets to some address."""

    dev: str
    source: IPAddress | None
    """The address they would bear."""


class HostFacts(Struct, frozen=True):
    """What the kernel says about this host, before any choice is made from it."""

    links: tuple[LinkFacts, ...]
    default_devices: PerFamily[str] = field(default_factory=PerFamily)
    """Device of the first default route of the main table."""
    ipv6: bool = True
    """Whether the kernel has IPv6 at all (/proc/sys/net/ipv6 exists)."""
    gateways: frozenset[IPAddress] = frozenset()
    """Next hops of the default routes of the main table."""
    onlink: Mapping[str, tuple[IPNetwork, ...]] = field(default_factory=dict)
    """Device → the prefixes that main-table routes reach through it without a gateway."""
    default_devices_besides: PerFamily[tuple[str, ...]] = field(default_factory=PerFamily)
    """The other devices of that default route, where it has several."""
    ways: Mapping[IPAddress, Way] = field(default_factory=dict)
    """Of the addresses asked about those that are reached → how."""


class External(PartlyCompared, frozen=True):
    """The interface that carries the overlay's packets."""

    compared = 5

    name: str
    mtu: int
    addresses: PerFamily[IPAddress]
    """Its own addresses, the tunnel's local end."""
    public: PerFamily[IPAddress]
    """The addresses published to the peers."""
    mac: str = ""
    how: str = ""
    """What chose it: `--iface eth0`, `the default route`."""


class Host(Struct, frozen=True):
    """This host as the decisions see it."""

    node_id: str
    prefix: str
    """The etcd prefix, which also marks what is ours."""
    external: External
    local_addresses: frozenset[IPAddress] = frozenset()
    devices: Mapping[IPAddress, str] = field(default_factory=dict)
    """Of these addresses → its device."""
    bridges: frozenset[str] = frozenset()
    """Devices that are bridges."""
    local_networks: tuple[IPNetwork, ...] = ()
    """Prefixes of the host's own addresses: what a new subnet must not overlap."""
    macs: Mapping[str, str] = field(default_factory=dict)
    """Device → MAC of the links that are there."""
    tun: str = "flannel0"
    """Name of our TUN device: of the one that there is, or of one to be made."""
    ipv6: bool = True
    """Whether the kernel has IPv6 at all."""
    gateways: frozenset[IPAddress] = frozenset()
    """Next hops of the default routes."""
    onlink: tuple[IPNetwork, ...] = ()
    """Prefixes that the external interface reaches without a gateway."""
    bad_checksums: bool = False
    """Whether packets with a wrong UDP checksum keep arriving."""
    registry: frozenset[IPAddress] = frozenset()
    """Addresses of the etcd endpoints, as far as they were given as such."""
    mac_seed: str = ""
    """Random; a VTEP MAC is made from it when another host has the one made from the node id."""


class OwnLease(Struct, frozen=True):
    """The lease this host holds."""

    record: Record
    ttl: int
    """Seconds granted; 0 for a reservation, which never ends."""


# --- desired and actual ---------------------------------------------------------------------------
ROUTE_PROTOCOL = 96
"""rtm_protocol of every route of ours; 96 is not assigned in linux/rtnetlink.h."""

NEXTHOP_PROTOCOL = 2
"""nh_protocol of every nexthop object of ours: RTPROT_KERNEL, though the kernel makes none by itself.

systemd-networkd removes those of all others from an interface that it manages, and before version 256 has no
setting against that.
"""


class VxlanLink(Struct, frozen=True):
    """A vxlan device, in the terms of linux/if_link.h IFLA_VXLAN_*."""

    vni: int
    port: int
    dev: str
    """The underlying device."""
    local: IPAddress
    mtu: int
    mac: str
    alias: str
    learning: bool = False
    gbp: bool = False
    up: bool = True


Link: TypeAlias = VxlanLink | TunLink


class NextHop(NamedTuple):
    """Where a route leads. A nexthop object of the kernel for IPv4, inline in the route for IPv6.

    Inline without a gateway, too: a TUN that nobody reads has no carrier, and with that go nexthop objects.
    """

    dev: str
    via: IPAddress | None
    """None: whatever takes the device's packets knows."""
    onlink: bool


class Route(NamedTuple):
    """The value of a route to one subnet in table main at metric 0."""

    nexthop: NextHop
    protocol: int = ROUTE_PROTOCOL


class State(Struct, frozen=True):
    """Kernel objects and files: what we want, or what is there. Each table has one driver."""

    links: Mapping[str, Link] = field(default_factory=dict)
    sysctls: Mapping[str, str] = field(default_factory=dict)
    """Path below /proc/sys → value: `net/ipv6/conf/flannel.1/accept_ra` → `0`."""
    addrs: Mapping[tuple[str, IPInterface], bool] = field(default_factory=dict)
    """(device, address) → True: present."""
    pumps: Mapping[str, PumpSettings] = field(default_factory=dict)
    """TUN device → what carries its packets."""
    tunnel: Mapping[tuple[str, IPNetwork], Endpoint] = field(default_factory=dict)
    """(TUN device, subnet) → the peer to whom the pump sends what is for it."""
    fdb: Mapping[tuple[str, str], IPAddress] = field(default_factory=dict)
    """(device, VTEP MAC) → underlay address."""
    neighs: Mapping[tuple[str, IPAddress], str] = field(default_factory=dict)
    """(device, address) → MAC, permanent."""
    nexthops: Mapping[NextHop, bool] = field(default_factory=dict)
    routes: Mapping[IPNetwork, Route] = field(default_factory=dict)
    blackholes: Mapping[IPNetwork, bool] = field(default_factory=dict)
    """Destination → True: in table main, at a metric at which every other route is better."""
    offloads: Mapping[str, bool] = field(default_factory=dict)
    """Device → whether checksums of what it sends are left to the device below it."""
    rules: Mapping[ChainKey, Chain] = field(default_factory=dict)
    """Chain → its packet-filter rules; of a chain that is not wholly ours, our rules of it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Path → text."""

    def table(self, name: Table) -> Mapping[Any, Any]:
        table: Mapping[Any, Any] = getattr(self, name)
        return table


Table: TypeAlias = Literal[
    "links",
    "sysctls",
    "offloads",
    "addrs",
    "pumps",
    "tunnel",
    "fdb",
    "neighs",
    "nexthops",
    "routes",
    "blackholes",
    "files",
    "rules",
]
Verb: TypeAlias = Literal["set", "del"]


class Room(NamedTuple):
    """What another link has to make room for."""

    name: str
    link: Link


class Op(NamedTuple):
    """One step of a plan."""

    verb: Verb
    table: Table
    key: Any
    value: Any = None
    """For `set`: the row as it shall be; for `del` of a link: the Room that is made, if it is for another."""


class Outcome(NamedTuple):
    """What became of one op; "already so" is success."""

    op: Op
    error: str | None = None


# Forty thousand made one by one, by a function of Python's each, would take three times as long.
_OP, _OUTCOME = partial(tuple.__new__, Op), partial(tuple.__new__, Outcome)


def sets(table: Table, rows: Mapping[Any, Any]) -> list[Op]:
    """Ops that set all rows of a table."""
    return list(map(_OP, zip(repeat("set"), repeat(table), rows, rows.values(), strict=False)))


def successes(ops: Sequence[Op]) -> list[Outcome]:
    """Of each op."""
    return list(map(_OUTCOME, zip(ops, repeat(None), strict=False)))


class Scope(Struct, frozen=True):
    """What `observe` may take for ours."""

    prefix: str
    networks: tuple[IPNetwork, ...]
    """The Networks of the config, of the old subnet.env and of the state file."""
    adoptable: Mapping[IPNetwork, frozenset[IPAddress]] = field(default_factory=dict)
    """Subnet of a known record → gateways under which Go flannel would have left its route."""
    sysctls: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    offloads: frozenset[str] = frozenset()
    """Devices whose checksum offload is ours to say."""
    devices: frozenset[str] = frozenset()
    """Names of the wanted devices: what Go flannel left under another name is not adopted."""
