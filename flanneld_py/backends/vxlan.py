"""vxlan: kernel VXLAN devices, with three rows a peer instead of flooding and learning.

A packet to a peer's subnet takes the route `subnet via <subnet base> dev flannel.1 onlink`; the neighbour
entry for that base gives the peer's VTEP MAC, and the FDB entry for the MAC gives the underlay address to
encapsulate to (RFC 7348). With DirectRouting a peer on a network that the external interface is connected to
gets a plain route via its own address instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import ip_interface
from itertools import chain, count
from typing import ClassVar

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.addresses import Family, IPAddress, IPNetwork, PerFamily
from flanneld_py.backends.base import Published, direct_route
from flanneld_py.core import options
from flanneld_py.core.configkeys import Key
from flanneld_py.core.nodeid import vtep_mac
from flanneld_py.core.ownership import link_alias
from flanneld_py.errors import ConfigError
from flanneld_py.model import Host, Link, NetworkConfig, NextHop, Record, Route, State, VxlanLink

OVERHEAD: dict[Family, int] = {4: 50, 6: 70}
"""Outer IP (20 or 40), UDP 8, VXLAN 8 and inner Ethernet 14 bytes."""
IPV6_MIN_MTU = 1280
"""A device with less has no IPv6, nor its sysctls (RFC 8200, section 5; addrconf_notify of net/ipv6)."""
LOWEST_MTU: dict[Family, int] = {4: 576, 6: IPV6_MIN_MTU + OVERHEAD[6]}
"""Of the external interface: what any IPv4 host takes (RFC 791), and what leaves IPv6 enough inside."""
KERNEL_PORT = 8472
"""The kernel's default (drivers/net/vxlan, vxlan_port), from before IANA assigned 4789."""
KEYS = (
    Key("VNI", "1", "VXLAN network identifier: 1 to 9999999, with IPv6 to 9999; devices are `flannel.<VNI>`"),
    Key("Port", "8472", "UDP port; 0 is the default, too"),
    Key(
        "MTU",
        "0",
        "of the path between hosts, 576 (IPv6: 1350) to 65535; never above the interface's, which 0 means",
    ),
    Key("GBP", "false", "carry group based policy marks"),
    Key("Learning", "false", "let the kernel learn addresses from packets"),
    Key("DirectRouting", "false", "plain routes to hosts on a network that this host is part of"),
    Key(
        "TxChecksum",
        '"auto"',
        "`on`, `off`, or `auto`: leave checksums to the hardware until bad ones are counted",
    ),
)
CHECKSUMS = ("auto", "on", "off")


class Vxlan(Struct, frozen=True):
    """The options of the config's Backend with type vxlan."""

    families: tuple[Family, ...]
    vni: int = 1
    port: int = KERNEL_PORT
    external_mtu: int = 0
    """The MTU to assume of the external interface, if lower than its own; 0: its own."""
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False
    """Whether hosts on one network exchange packets without the tunnel."""
    tx_checksum: str = "auto"
    """Whether the devices leave checksums to the hardware; auto: as the kernel has it, until it does harm."""
    type: ClassVar[str] = "vxlan"

    @classmethod
    def from_config(cls, config: NetworkConfig) -> Vxlan:
        """Read the options.

        Raises:
            ConfigError: an option has the wrong type or lies out of range.
        """
        given = config.backend_options
        families = config.families
        return cls(
            families=families,
            # flannel-v6.<VNI> must fit the kernel's 15 characters of an interface name.
            vni=options.integer(given, "VNI", 1, 1, 9_999 if 6 in families else 9_999_999),
            port=options.integer(given, "Port", 0, 0, 65_535) or KERNEL_PORT,
            external_mtu=options.mtu(given, families, LOWEST_MTU),
            gbp=options.boolean(given, "GBP", default=False),
            learning=options.boolean(given, "Learning", default=False),
            direct_routing=options.boolean(given, "DirectRouting", default=False),
            tx_checksum=options.one_of(given, "TxChecksum", "auto", CHECKSUMS),
        )

    @property
    def keys(self) -> tuple[Key, ...]:
        return KEYS

    @property
    def watches_checksums(self) -> bool:
        return self.tx_checksum == "auto"

    def device(self, family: Family) -> str:
        return f"flannel.{self.vni}" if family == 4 else f"flannel-v6.{self.vni}"

    def device_mtu(self, host: Host, family: Family) -> int:
        """At most what the kernel takes: it clamps or refuses more (drivers/net/vxlan, vxlan_change_mtu).

        But never so little that the device would lose IPv6 and all its peers: the kernel then refuses, what
        stands stays as it is, and the reason is told.
        """
        room = self._room(host, family)
        return room if family == 4 else max(room, IPV6_MIN_MTU)

    def mtu(self, host: Host) -> int:
        lowest = min(self.device_mtu(host, family) for family in self.families)
        return lowest if 6 not in self.families else max(lowest, IPV6_MIN_MTU)

    def _room(self, host: Host, family: Family) -> int:
        external = host.external.mtu
        return min(self.external_mtu or external, external) - OVERHEAD[family]

    def published(self, host: Host, own: Record | None, taken: Collection[str] = ()) -> Published:
        data = {
            family: {"VNI": self.vni, "VtepMAC": self._mac(host, own, family, taken)}
            for family in self.families
        }
        return Published(
            backend_type=self.type,
            public_ips=host.external.public,
            backend_data=PerFamily(v4=data.get(4), v6=data.get(6)),
        )

    def desired(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        rows = self.peer_rows(own, peers, host)
        return replace(self._devices(own, host), fdb=rows.fdb, neighs=rows.neighs, routes=rows.routes)

    def peer_rows(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        fdb: dict[tuple[str, str], IPAddress] = {}
        neighs: dict[tuple[str, IPAddress], str] = {}
        routes: dict[IPNetwork, Route] = {}
        connected = host.onlink if self.direct_routing else ()
        for family in self.families:
            dev = self.device(family)
            for peer in peers if own.subnets.get(family) is not None else ():
                target, mac = peer.subnets.get(family), peer.vtep_macs.get(family)
                public = peer.public_ips.get(family)
                if target is None or mac is None or public is None:
                    continue
                if any(public in network for network in connected):
                    routes[target] = direct_route(host, public)
                    continue
                via = target.network_address
                fdb[dev, mac] = public
                neighs[dev, via] = mac
                routes[target] = Route(NextHop(dev, via, onlink=True))
        return State(fdb=fdb, neighs=neighs, routes=routes)

    def _devices(self, own: Record, host: Host) -> State:
        """What stands without peers as well."""
        links: dict[str, Link] = {}
        sysctls: dict[str, str] = {}
        offloads: dict[str, bool] = {}
        addrs = {}
        offload = self._offload(host)
        for family, subnet in own.subnets.items():
            dev = self.device(family)
            links[dev] = self._link(own, host, family)
            addrs[dev, ip_interface(subnet.network_address)] = True
            if host.ipv6 and self._room(host, family) >= IPV6_MIN_MTU:
                # A router advertisement inside the overlay must not give the host a default route.
                sysctls[f"net/ipv6/conf/{dev}/accept_ra"] = "0"
                if family == 6:
                    # A host may disable IPv6 for whatever interface comes, and enable it where it is wanted.
                    sysctls[f"net/ipv6/conf/{dev}/disable_ipv6"] = "0"
            if offload is not None:
                offloads[dev] = offload
        return State(links=links, sysctls=sysctls, offloads=offloads, addrs=addrs)

    def _offload(self, host: Host) -> bool | None:
        """What checksum offload shall be; None: as the kernel and others have it."""
        if self.tx_checksum == "auto":
            return False if host.bad_checksums else None
        return self.tx_checksum == "on"

    def _link(self, own: Record, host: Host, family: Family) -> VxlanLink:
        local = host.external.addresses.get(family)
        if local is None:
            raise ConfigError(
                f"IPv{family} is enabled in the network config, but {host.external.name} has no IPv{family} "
                f"address to tunnel from; add one or choose another --iface"
            )
        return VxlanLink(
            vni=self.vni,
            port=self.port,
            dev=host.external.name,
            local=local,
            mtu=self.device_mtu(host, family),
            mac=self._mac(host, own, family),
            alias=link_alias(host.prefix),
            learning=self.learning,
            gbp=self.gbp,
        )

    def _mac(self, host: Host, own: Record | None, family: Family, taken: Collection[str] = ()) -> str:
        """What peers know, else what the device has, else one made from our identity, else a random one."""
        dev = self.device(family)
        known = (own.vtep_macs.get(family) if own else None, host.macs.get(dev))
        made = vtep_mac(host.node_id, host.prefix, dev)
        others = (vtep_mac(host.mac_seed or host.node_id, host.prefix, dev, salt) for salt in count(1))
        return next(mac for mac in chain((*known, made), others) if mac and mac not in taken)
