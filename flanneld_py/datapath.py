"""Values of a data plane in user space: what a pump is told, and where it sends packets."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct

from flanneld_py.addresses import IPNetwork, Subnets


class TunLink(Struct, frozen=True):
    """A persistent TUN device, whose packets a pump carries."""

    mtu: int
    alias: str
    up: bool = True
    queue: int = 1000
    """Packets that it holds while its pump is replaced; the kernel's default is 500."""


Plane: TypeAlias = Literal["auto", "native", "python"]
SourceCheck: TypeAlias = Literal["false", "true", "strict"]


class PumpSettings(Struct, frozen=True):
    """What moves packets between a TUN device and the peers, but for who these are."""

    address: IPv4Address
    """Of this host: the socket's."""
    port: int
    subnets: Subnets
    """What received packets must be for."""
    networks: tuple[IPNetwork, ...]
    """The whole overlay, for the check of inner sources."""
    mtu: int
    """Of the TUN."""
    plane: Plane = "auto"
    source_check: SourceCheck = "true"


class Endpoint(NamedTuple):
    """Where packets to a peer's subnet are sent."""

    address: IPv4Address
    port: int
    ipv6: bool
    """Whether it takes IPv6 packets."""
