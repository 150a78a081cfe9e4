"""udp: a TUN device that leads to the whole overlay, and a pump that sends its packets in UDP datagrams.

A datagram holds one bare inner packet, as flannel's do, so hosts of flannel can be peers. Outside it is IPv4
always. An IPv6 packet goes only to a peer whose record says that it takes them, by DUAL_STACK in its
BackendV6Data: flannel writes nothing there for udp, and reads nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, ip_interface
from typing import ClassVar, get_args

from msgspec import Struct

from flanneld_py.addresses import Family, IPAddress, IPNetwork, PerFamily
from flanneld_py.backends.base import Published
from flanneld_py.core import options
from flanneld_py.core.configkeys import Key
from flanneld_py.core.ownership import link_alias
from flanneld_py.datapath import (
    Endpoint,
    Plane,
    PumpSettings,
    SourceCheck,
    TunLink,
)
from flanneld_py.errors import ConfigError, HostError
from flanneld_py.model import Host, NetworkConfig, NextHop, Record, Route, State

OVERHEAD = 28
"""Outer IPv4 20 and UDP 8 bytes."""
IPV6_MIN_MTU = 1280
"""A device with less has no IPv6 (RFC 8200, section 5; addrconf_notify of net/ipv6)."""
HIGHEST_MTU = 65_507
"""More does not fit a UDP datagram over IPv4 (RFC 768)."""
PORT = 8285
DUAL_STACK = "IPv6"
"""The key of BackendV6Data that a host with IPv6 in the overlay sets to true."""
PLANES: tuple[Plane, ...] = get_args(Plane)
SOURCE_CHECKS: tuple[bool | str, ...] = (True, False, "true", "false", "strict")
KEYS = (
    Key("Port", "8285", "UDP port of all hosts, as records do not tell; 0 is the default, too"),
    Key(
        "DataPlane",
        '"auto"',
        "what moves packets: `python` (slower), or `auto`: `native` (compiled), and Python where the "
        "extension is not installed or has crashed three times within a minute; `native` is the same, but a "
        "missing extension is then a problem in the status",
    ),
    Key(
        "SourceCheck",
        "true",
        "which inner sources a host may send: with `true` those inside the Network must be its own, with "
        '`"strict"` all must, with `false` any will do',
    ),
)


class Udp(Struct, frozen=True):
    """The options of the config's Backend with type udp."""

    families: tuple[Family, ...]
    networks: tuple[IPNetwork, ...]
    port: int = PORT
    data_plane: Plane = "auto"
    source_check: SourceCheck = "true"
    type: ClassVar[str] = "udp"

    @classmethod
    def from_config(cls, config: NetworkConfig) -> Udp:
        """Read the options.

        Raises:
            ConfigError: an option has the wrong type or lies out of range, or there is no IPv4.
        """
        given = config.backend_options
        if 4 not in config.families:
            raise ConfigError(
                "EnableIPv4 false: Backend.Type udp carries packets over IPv4, IPv6 beside it; enable IPv4, "
                "or set Backend.Type to vxlan"
            )
        checks: tuple[bool | str, ...] = SOURCE_CHECKS
        check = str(options.one_of(given, "SourceCheck", True, checks)).lower()
        return cls(
            families=config.families,
            networks=config.networks,
            port=options.integer(given, "Port", 0, 0, 65_535) or PORT,
            data_plane=options.one_of(given, "DataPlane", "auto", PLANES),
            source_check=next(name for name in get_args(SourceCheck) if name == check),
        )

    @property
    def keys(self) -> tuple[Key, ...]:
        return KEYS

    @property
    def watches_checksums(self) -> bool:
        return False

    def mtu(self, host: Host) -> int:
        """Also the device's.

        Raises:
            HostError: IPv6 needs more.
        """
        mtu = min(host.external.mtu - OVERHEAD, HIGHEST_MTU)
        if 6 in self.families and mtu < IPV6_MIN_MTU:
            raise HostError(
                f"{host.external.name} has MTU {host.external.mtu}, and IPv6 inside udp needs "
                f"{IPV6_MIN_MTU + OVERHEAD}: raise it, or set EnableIPv6 to false"
            )
        return mtu

    def published(self, host: Host, own: Record | None, taken: Collection[str] = ()) -> Published:  # noqa: ARG002 - see Backend
        # Its records bear no type, as flannel writes them.
        data = {DUAL_STACK: True} if 6 in self.families else None
        return Published(backend_type="", public_ips=host.external.public, backend_data=PerFamily(None, data))

    def desired(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        dev, mtu = host.tun, self.mtu(host)
        sysctls: dict[str, str] = {}
        if host.ipv6 and mtu >= IPV6_MIN_MTU:
            # A router advertisement inside the overlay must not give the host a default route.
            sysctls[f"net/ipv6/conf/{dev}/accept_ra"] = "0"
            if 6 in self.families:
                sysctls[f"net/ipv6/conf/{dev}/disable_ipv6"] = "0"
        return State(
            links={dev: TunLink(mtu, link_alias(host.prefix))},
            sysctls=sysctls,
            addrs={(dev, ip_interface(net.network_address)): True for net in own.subnets.values()},
            pumps={dev: self._pump(own, host, mtu)},
            tunnel=self.peer_rows(own, peers, host).tunnel,
            routes={
                network: Route(NextHop(dev, None, onlink=False))
                for network in self.networks
                if any(network.version == family for family, _ in own.subnets.items())
            },
        )

    def peer_rows(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        tunnel = {
            (host.tun, subnet): Endpoint(public, self.port, ipv6=takes_ipv6(peer))
            for peer in peers
            if isinstance(public := peer.public_ips.v4, IPv4Address)
            for family, subnet in peer.subnets.items()
            if own.subnets.get(family) is not None
        }
        return State(tunnel=tunnel)

    def _pump(self, own: Record, host: Host, mtu: int) -> PumpSettings:
        # Peers send to the published address, and take packets from no other; one that a NAT has is not ours.
        public: IPAddress | None = host.external.public.v4
        local = public if public in host.local_addresses else host.external.addresses.v4
        if not isinstance(local, IPv4Address):
            raise ConfigError(
                f"Backend.Type udp carries packets over IPv4, but {host.external.name} has no IPv4 address "
                f"to send them from; add one or choose another --iface"
            )
        return PumpSettings(
            address=local,
            port=self.port,
            subnets=own.subnets,
            networks=self.networks,
            mtu=mtu,
            plane=self.data_plane,
            source_check=self.source_check,
        )


def takes_ipv6(peer: Record) -> bool:
    """Whether its record announces IPv6 inside the tunnel."""
    data = peer.backend_data.v6
    return isinstance(data, dict) and data.get(DUAL_STACK) is True
