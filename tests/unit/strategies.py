"""Hypothesis strategies for the values of flanneld_py.model: small worlds in which things meet often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Any, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import Family, IPAddress, IPNetwork, PerFamily, Subnets
from flanneld_py.core.rules import Tool, Wish, desired_rules, names_of
from flanneld_py.datapath import (
    Endpoint,
    PumpSettings,
    TunLink,
)
from flanneld_py.model import (
    Entry,
    External,
    Host,
    Link,
    Listing,
    NetworkConfig,
    NextHop,
    Record,
    Route,
    Snapshot,
    State,
    SubnetRange,
    Table,
    VxlanLink,
)

# No deadline: a busy machine is no defect.
usual = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(usual, max_examples=150)

PREFIX = "/coreos.com/network"
NETWORKS: dict[Family, IPNetwork] = {4: IPv4Network("10.5.0.0/16"), 6: IPv6Network("fd00:5::/48")}
SUBNET_LEN: dict[Family, int] = {4: 24, 6: 64}
UNDERLAY: dict[Family, IPNetwork] = {4: IPv4Network("192.0.2.0/24"), 6: IPv6Network("2001:db8::/64")}


TABLES: tuple[Table, ...] = (
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
)


# --- narrower types ------------------------------------------------------------------------------


def vxlan(link: Link) -> VxlanLink:
    assert isinstance(link, VxlanLink)
    return link


def neighbour(hop: NextHop) -> tuple[str, IPAddress]:
    """The key of its neighbour."""
    assert hop.via is not None
    return hop.dev, hop.via


# --- addresses by number --------------------------------------------------------------------------


def subnet(family: Family, number: int) -> IPNetwork:
    """The subnet of a number: 10.5.7.0/24 or fd00:5:0:7::/64."""
    shift = NETWORKS[family].max_prefixlen - SUBNET_LEN[family]
    base = int(NETWORKS[family].network_address) + (number << shift)
    return ip_network((_address(family, base), SUBNET_LEN[family]))


def underlay(family: Family, number: int) -> IPAddress:
    """The address of the host of a number: 192.0.2.7 or 2001:db8::7."""
    return UNDERLAY[family].network_address + number


def mac(number: int) -> str:
    return f"02:00:00:00:{number >> 8:02x}:{number & 0xFF:02x}"


def per_family(values: Mapping[Family, Any]) -> PerFamily[Any]:
    return PerFamily(v4=values.get(4), v6=values.get(6))


def _address(family: Family, number: int) -> IPAddress:
    return IPv4Address(number) if family == 4 else IPv6Address(number)


FAMILIES: st.SearchStrategy[tuple[Family, ...]] = st.sampled_from(((4,), (6,), (4, 6)))


# --- registry -------------------------------------------------------------------------------------


def all_subnets() -> st.SearchStrategy[Subnets]:
    """Of either family or both, of every length that a key can name, anywhere."""
    v4 = st.builds(
        lambda base, length: IPv4Network((base >> 32 - length << 32 - length, length)),
        st.integers(0, 2**32 - 1),
        st.integers(1, 31),
    )
    v6 = st.builds(
        lambda base, length: IPv6Network((base >> 128 - length << 128 - length, length)),
        st.integers(0, 2**128 - 1),
        st.integers(1, 127),
    )
    return st.builds(PerFamily, v4, st.none() | v6) | st.builds(PerFamily, st.none(), v6)


def config(
    backend_type: str = "vxlan",
    families: Sequence[Family] = (4,),
    options: Mapping[str, Any] | None = None,
    subnets: int = 255,
    halves: bool = False,
) -> NetworkConfig:
    """A config whose ranges hold the subnets 1 to `subnets`, or the halves of these."""
    ranges = {}
    for family in families:
        parts: list[IPNetwork] = [*subnet(family, subnets).subnets(int(halves))]
        last = parts[-1]
        ranges[family] = SubnetRange(
            network=NETWORKS[family],
            subnet_len=last.prefixlen,
            subnet_min=subnet(family, 1).network_address,
            subnet_max=last.network_address,
        )
    return NetworkConfig(per_family(ranges), backend_type, options or {})


@st.composite
def subnet_ranges(draw: st.DrawFn, most: int = 64) -> SubnetRange:
    """Ranges of at most `most` subnets, of every length, also at either end of the address space."""
    family: Family = draw(st.sampled_from((4, 6)))
    bits = 32 if family == 4 else 128
    subnet_len = draw(st.integers(10, bits - 2))
    wide = draw(st.integers(2, min(8, subnet_len - 2)))
    network_len = subnet_len - wide
    last_network = (1 << network_len) - 1
    where = draw(st.sampled_from((0, 1, last_network - 1, last_network)))
    base = where << (bits - network_len)
    first = draw(st.integers(0, (1 << wide) - 1))
    last = draw(st.integers(first, min(first + most - 1, (1 << wide) - 1)))
    step = 1 << (bits - subnet_len)
    return SubnetRange(
        network=ip_network((_address(family, base), network_len)),
        subnet_len=subnet_len,
        subnet_min=_address(family, base + first * step),
        subnet_max=_address(family, base + last * step),
    )


def by_enumeration(allowed: SubnetRange, taken: Sequence[IPNetwork]) -> list[IPNetwork]:
    """Every subnet of the range that overlaps nothing, one by one."""
    step = 1 << (allowed.network.max_prefixlen - allowed.subnet_len)
    bases = range(int(allowed.subnet_min), int(allowed.subnet_max) + 1, step)
    kind = type(allowed.network)
    candidates: list[IPNetwork] = [kind((base, allowed.subnet_len)) for base in bases]
    same_family = [net for net in taken if net.version == allowed.network.version]
    return [c for c in candidates if not any(c.overlaps(net) for net in same_family)]


@st.composite
def networks_near(draw: st.DrawFn, allowed: SubnetRange) -> IPNetwork:
    """A network inside, around, beside or across the ends of a range, shorter or longer than its subnets."""
    bits = allowed.network.max_prefixlen
    length = draw(st.integers(max(1, allowed.network.prefixlen - 2), min(bits, allowed.subnet_len + 3)))
    low, high = int(allowed.network.network_address), int(allowed.network.broadcast_address)
    size = high - low + 1
    near = draw(st.integers(max(0, low - size // 2), min((1 << bits) - 1, high + size // 2)))
    return ip_network((_address(_family(allowed.network), near), length), strict=False)


def _family(net: IPNetwork) -> Family:
    return 4 if net.version == 4 else 6


@st.composite
def clashing_subnets(draw: st.DrawFn, families: Sequence[Family]) -> Subnets:
    """A lease's subnets from so few that they overlap: exact, longer, shorter, and outside the Network."""
    found: dict[Family, IPNetwork] = {}
    for family in families:
        number = draw(st.integers(0, 5))
        net = subnet(family, number)
        kind = draw(st.sampled_from(("same", "same", "same", "half", "double", "whole", "outside")))
        if kind == "half":
            halves: list[IPNetwork] = [*net.subnets()]
            net = halves[draw(st.integers(0, 1))]
        elif kind == "double":
            net = net.supernet()
        elif kind == "whole":
            net = NETWORKS[family].supernet(draw(st.integers(0, 1)))
        elif kind == "outside":
            net = ip_network("10.9.1.0/24" if family == 4 else "fd00:9:0:1::/64")
        found[family] = net
    return per_family(found)


@st.composite
def clashing_records(draw: st.DrawFn, name: str, families: Sequence[Family] = (4,)) -> Record:
    """A record that may clash with others in any way: subnet, MAC, address, backend, age."""
    used = draw(st.sampled_from((tuple(families), tuple(families), (4,), (6,), (4, 6))))
    publics: dict[Family, IPAddress] = {
        family: draw(st.one_of(st.just(underlay(family, draw(st.integers(1, 9)))), _odd_publics(family)))
        for family in used
    }
    if draw(st.integers(0, 9)) == 0:
        publics.pop(used[-1])
    macs = {family: mac(draw(st.integers(1, 12))) for family in used}
    return Record(
        key=name,
        subnets=draw(clashing_subnets(used)),
        public_ips=per_family(publics),
        backend_type=draw(st.sampled_from(("vxlan",) * 6 + ("host-gw", ""))),
        vtep_macs=per_family(macs),
        node_id=f"node-{name}",
        create_revision=draw(st.integers(1, 6)),
        etcd_lease=0x77,
    )


def _odd_publics(family: Family) -> st.SearchStrategy[IPAddress]:
    """Rarely right: inside the Network, or this host's own."""
    inside = subnet(family, 3).network_address + 9
    return st.sampled_from((*(underlay(family, n) for n in range(2, 8)), underlay(family, 1), inside))


def snapshot_of(records: Sequence[Record], revision: int = 100) -> Snapshot:
    return Snapshot(revision, 1, {record.key: record for record in records})


def listing_of(entries: Mapping[str, tuple[str, int, int, int]], revision: int) -> Listing:
    """Key → (value, create_revision, mod_revision, etcd_lease), as `EtcdRegistry.list` gives them."""
    return Listing(
        revision,
        1,
        tuple(
            Entry(f"subnets/{key}", value.encode(), created, modified, lease)
            for key, (value, created, modified, lease) in sorted(entries.items())
        ),
    )


# --- host -----------------------------------------------------------------------------------------


def host(number: int, families: Sequence[Family] = (4,), mtu: int = 1500, **more: Any) -> Host:
    """The host of a number, with eth0 in the underlay."""
    addresses = {family: underlay(family, number) for family in families}
    made = Host(
        node_id=f"node-{number}",
        prefix=PREFIX,
        external=External("eth0", mtu, per_family(addresses), per_family(addresses)),
        local_addresses=frozenset(addresses.values()),
        local_networks=tuple(UNDERLAY[family] for family in families),
    )
    return replace(made, **more)


# --- states ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """What a state says of one peer, as rows."""

    number: int
    mac: str
    public: IPAddress
    direct: bool
    """Routed by plain IP instead of the tunnel."""


@st.composite
def states(draw: st.DrawFn) -> State:
    """What a host may want, or may have: vxlan devices of some families with peers, and direct routes.

    They are drawn from so few values that two of them share links, peers and MACs, in every mixture.
    """
    tables: dict[str, dict[Any, Any]] = {table: {} for table in TABLES}
    vni, port = draw(st.sampled_from((1, 1, 1, 2))), draw(st.sampled_from((8472, 8472, 4789)))
    gbp, up_mac = draw(st.sampled_from((False, False, True))), draw(st.sampled_from((1, 1, 2)))
    choices: tuple[tuple[Family, ...], ...] = ((4,), (4,), (6,), (4, 6), ())
    families = draw(st.sampled_from(choices))
    if draw(st.sampled_from((False, False, False, True))):
        _add_tun(draw, tables, families)
        families = ()
    for family in families:
        link = VxlanLink(
            vni=vni,
            port=port,
            dev=draw(st.sampled_from(("eth0", "eth0", "eth1"))),
            local=underlay(family, draw(st.sampled_from((1, 1, 2)))),
            mtu=draw(st.sampled_from((1450, 1450, 1400))),
            mac=mac(0x100 * family + up_mac),
            alias=f"flanneld-py:{PREFIX}",
            learning=draw(st.booleans()),
            gbp=gbp,
        )
        _add_overlay(draw, tables, family, f"flannel.{vni}" if family == 4 else f"flannel-v6.{vni}", link)
    tool = draw(st.sampled_from((None, *get_args(Tool))))
    if tool is not None:
        networks: Subnets = PerFamily(NETWORKS[4])
        own: Subnets = PerFamily(subnet(4, 1))
        wish = Wish(masquerade=draw(st.booleans()))
        tables["rules"] = desired_rules(networks, own, wish, names_of(PREFIX), tool)
    tables["files"] = dict(draw(st.sampled_from(((), (("/run/a", "1"),), (("/run/a", "2"),)))))
    return State(**tables)


def _add_overlay(
    draw: st.DrawFn, tables: dict[str, dict[Any, Any]], family: Family, dev: str, link: VxlanLink
) -> None:
    tables["links"][dev] = link
    tables["sysctls"][f"net/ipv6/conf/{dev}/accept_ra"] = "0"
    offload = draw(st.sampled_from((None, None, True, False)))
    if offload is not None:
        tables["offloads"][dev] = offload
    own = draw(st.sampled_from((1, 1, 9)))
    if draw(st.booleans()):
        tables["blackholes"][subnet(family, own)] = True
    tables["addrs"][dev, ip_interface(subnet(family, own).network_address)] = True
    for peer in draw(_peers(family)):
        target = subnet(family, peer.number)
        if peer.direct:
            hop = NextHop("eth0", peer.public, onlink=False)
        else:
            hop = NextHop(dev, target.network_address, onlink=True)
            tables["fdb"][dev, peer.mac] = peer.public
            tables["neighs"][dev, target.network_address] = peer.mac
        tables["routes"][target] = Route(hop)
        if family == 4:
            tables["nexthops"][hop] = True


def _add_tun(draw: st.DrawFn, tables: dict[str, dict[Any, Any]], families: Sequence[Family]) -> None:
    """What backend udp wants, of any family."""
    dev = draw(st.sampled_from(("flannel0", "flannel0", "flannel1")))
    number = draw(st.sampled_from((1, 1, 9)))
    mtu = draw(st.sampled_from((1472, 1472, 1400)))
    tables["links"][dev] = TunLink(mtu, f"flanneld-py:{PREFIX}")
    tables["sysctls"][f"net/ipv6/conf/{dev}/accept_ra"] = "0"
    own = {family: subnet(family, number) for family in families}
    for family, net in own.items():
        tables["addrs"][dev, ip_interface(net.network_address)] = True
        tables["routes"][NETWORKS[family]] = Route(NextHop(dev, None, onlink=False))
        for peer in draw(_peers(family)):
            end = Endpoint(IPv4Address(f"192.0.2.{peer.number}"), 8285, ipv6=draw(st.booleans()))
            tables["tunnel"][dev, subnet(family, peer.number)] = end
    networks = tuple(NETWORKS[family] for family in families)
    port = draw(st.sampled_from((8285, 8285, 9000)))
    tables["pumps"][dev] = PumpSettings(IPv4Address("192.0.2.1"), port, per_family(own), networks, mtu)


@st.composite
def _peers(draw: st.DrawFn, family: Family) -> list[Peer]:
    numbers = draw(st.lists(st.integers(2, 6), unique=True, max_size=4))
    # Distinct MACs from few: a peer may come to bear the one that another had.
    macs = draw(st.lists(st.integers(1, 7), unique=True, min_size=len(numbers), max_size=len(numbers)))
    return [
        Peer(
            number=number,
            mac=mac(chosen),
            public=ip_address(underlay(family, draw(st.sampled_from((number, number, 60 + number))))),
            direct=draw(st.sampled_from((False, False, False, True))),
        )
        for number, chosen in zip(numbers, macs, strict=True)
    ]
