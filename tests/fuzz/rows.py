"""What the rows that follow from records must be, said without the code that makes them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from typing import TYPE_CHECKING

from flanneld_py.addresses import IPAddress, IPNetwork, PerFamily
from flanneld_py.model import External, Host, State

if TYPE_CHECKING:
    from collections.abc import Collection

NETWORKS: tuple[IPNetwork, ...] = (IPv4Network("10.5.0.0/16"), IPv6Network("fd00:5::/48"))
OWN: tuple[IPNetwork, ...] = (IPv4Network("10.5.1.0/24"), IPv6Network("fd00:5:0:1::/64"))
OWN_MAC = "02:00:00:00:00:01"
PLACES: tuple[IPNetwork, ...] = (IPv4Network("10.5.30.0/24"), IPv4Network("10.5.33.1/32"))
"""Of this host inside the Network, beside its own subnet: a bridge's network, a gateway."""
ADDRESSES: frozenset[IPAddress] = frozenset(
    {IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1"), IPv4Address("10.5.30.1")}
)
ONLINK: tuple[IPNetwork, ...] = (IPv4Network("192.0.2.0/25"), IPv6Network("2001:db8::/64"))
BELOW = 400
"""No MTU is as small."""
HOST = Host(
    node_id="node-1",
    prefix="/coreos.com/network",
    external=External(
        "eth0",
        1500,
        PerFamily(IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")),
        PerFamily(IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")),
        "02:00:00:00:00:99",
    ),
    local_addresses=ADDRESSES,
    local_networks=(PLACES[0], *ONLINK),
    gateways=frozenset({IPv4Address("10.5.33.1"), IPv4Address("192.0.2.126")}),
    onlink=ONLINK,
    registry=frozenset({IPv4Address("192.0.2.125")}),
)


def overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)


def assert_harmless(state: State) -> None:
    """No row leads astray what is not a peer's."""
    leads: dict[IPNetwork, IPAddress | None] = {net: route.nexthop.via for net, route in state.routes.items()}
    leads |= {net: end.address for (_, net), end in state.tunnel.items()}
    peers = [net for net in leads if net not in NETWORKS]
    for subnet in peers:
        _assert_place(subnet)
    assert _are_apart(peers), f"two peers overlap: {peers}"
    for subnet, via in leads.items():
        if subnet in NETWORKS:
            assert via is None, "the whole Network to one peer"
        else:
            assert via is not None
            if via != subnet.network_address:
                _assert_reachable(via)
    for (dev, mac), public in state.fdb.items():
        assert dev.startswith("flannel")
        _assert_reachable(public)
        _assert_mac(mac)
    for (dev, address), mac in state.neighs.items():
        assert dev.startswith("flannel")
        assert address in {net.network_address for net in peers}
        _assert_mac(mac)
        assert (dev, mac) in state.fdb
    for hop in state.nexthops:
        assert hop in {route.nexthop for route in state.routes.values()}


def _assert_place(subnet: IPNetwork) -> None:
    (network,) = (net for net in NETWORKS if net.version == subnet.version)
    assert subnet.prefixlen > network.prefixlen, f"as large as the Network: {subnet}"
    assert subnet.network_address in network, f"outside: {subnet}"
    assert not any(overlap(subnet, net) for net in OWN), f"over our own subnet: {subnet}"
    assert not any(overlap(subnet, net) for net in PLACES), f"over what this host is part of: {subnet}"


def _are_apart(subnets: Collection[IPNetwork]) -> bool:
    for version in (4, 6):
        spans = sorted(
            (int(net.network_address), int(net.broadcast_address))
            for net in subnets
            if net.version == version
        )
        if any(last >= first for (_, last), (first, _) in pairwise(spans)):
            return False
    return True


def _assert_reachable(public: IPAddress) -> None:
    """An address to which packets may be sent: another host's, outside the overlay."""
    assert not public.is_unspecified, "nobody"
    assert not public.is_loopback, f"ourselves: {public}"
    assert not public.is_multicast, f"many: {public}"
    assert str(public) not in ("255.255.255.255", "192.0.2.127"), f"everybody: {public}"
    assert public not in ADDRESSES, f"ourselves: {public}"
    assert not any(public in net for net in NETWORKS), f"inside the overlay: {public}"


def _assert_mac(mac: str) -> None:
    octets = bytes.fromhex(mac.replace(":", ""))
    assert (len(octets), octets.hex(":")) == (6, mac)
    assert any(octets), "zero"
    assert not octets[0] & 1, f"for everybody: {mac}"
    assert mac != OWN_MAC, "our own MAC"
