"""host-gw: plain routes to the peers' hosts, for hosts that share a layer 2 segment."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from msgspec import Struct

from flanneld_py.addresses import IPNetwork
from flanneld_py.backends.base import Published, direct_route
from flanneld_py.core.configkeys import Key
from flanneld_py.errors import HostError
from flanneld_py.model import Host, NetworkConfig, Record, Route, State


class HostGw(Struct, frozen=True):
    """The config's Backend with type host-gw; it has no options."""

    type: ClassVar[str] = "host-gw"

    @classmethod
    def from_config(cls, config: NetworkConfig) -> HostGw:  # noqa: ARG003 - one signature for all backends
        return cls()

    @property
    def keys(self) -> tuple[Key, ...]:
        return ()

    @property
    def watches_checksums(self) -> bool:
        return False

    def mtu(self, host: Host) -> int:
        return host.external.mtu

    def published(self, host: Host, own: Record | None, taken: Collection[str] = ()) -> Published:  # noqa: ARG002 - see Backend
        for family, public in host.external.public.items():
            if public != host.external.addresses.get(family):
                flag = "--public-ip" if family == 4 else "--public-ipv6"
                raise HostError(
                    f"{flag} {public}: backend host-gw routes to the host's own address, but "
                    f"{host.external.name} does not have it; use vxlan behind NAT, or drop {flag}"
                )
        return Published(backend_type=self.type, public_ips=host.external.public)

    def desired(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        return self.peer_rows(own, peers, host)

    def peer_rows(self, own: Record, peers: Sequence[Record], host: Host) -> State:
        routes: dict[IPNetwork, Route] = {}
        for peer in peers:
            for family, subnet in peer.subnets.items():
                via = peer.public_ips.get(family)
                if via is not None and own.subnets.get(family) is not None:
                    routes[subnet] = direct_route(host, via)
        return State(routes=routes)
