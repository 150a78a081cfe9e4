"""What a changed network config means for a host that runs: in force at once, or pending, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from flanneld_py.addresses import FAMILIES, IPAddress, IPNetwork, Subnets
from flanneld_py.core.subnets import inside
from flanneld_py.model import Host, NetworkConfig, SubnetRange

AGREED = {"vni": "VNI", "port": "Port", "gbp": "GBP"}
"""Options that the hosts must have in common; the others concern one host alone."""


class Settings(NamedTuple):
    """A config, and the options of its backend with their defaults filled in."""

    config: NetworkConfig
    options: Mapping[str, Any]


def pending_reasons(
    old: Settings, new: Settings, own: Subnets | None, foreign: Collection[str]
) -> tuple[str, ...]:
    """Why `new` must not replace `old` while containers run; empty: it may, at once.

    As a whole or not at all: a config half in force is one that nobody has written.

    Args:
        old: in force.
        new: as stored now.
        own: the subnets that this host leases from the ranges; None: it has no lease yet that a change could
            break.
        foreign: keys of the records without a node id; Go flannel reads a config at its start only.
    """
    if own is None:
        return ()
    return (*_of_families(old.config, new.config, own), *_of_backend(old, new, foreign))


def _of_families(old: NetworkConfig, new: NetworkConfig, own: Subnets) -> Iterator[str]:
    for family in FAMILIES:
        before, after = old.ranges.get(family), new.ranges.get(family)
        if before is None or after is None:
            if before is not after:
                yield f"EnableIPv{family} becomes {'true' if after else 'false'}: hosts get other leases"
            continue
        yield from _of_range(before, after, own.get(family), "" if family == 4 else "IPv6")


def _of_range(before: SubnetRange, after: SubnetRange, own: IPNetwork | None, name: str) -> Iterator[str]:
    if before.network != after.network:
        yield f"{name}Network {before.network} becomes {after.network}: hosts get other subnets"
    elif before.subnet_len != after.subnet_len:
        yield f"{name}SubnetLen {before.subnet_len} becomes {after.subnet_len}: hosts get other subnets"
    elif own is not None and not int(after.subnet_min) <= int(own.network_address) <= int(after.subnet_max):
        bounds = f"{after.subnet_min} and {after.subnet_max}"
        yield f"{name}SubnetMin and {name}SubnetMax become {bounds}: {own} of this host lies outside"


def _of_backend(old: Settings, new: Settings, foreign: Collection[str]) -> Iterator[str]:
    changes = []
    if old.config.backend_type != new.config.backend_type:
        changes.append(f"Backend.Type {old.config.backend_type} becomes {new.config.backend_type}")
    else:
        changes += [
            f"Backend.{name} {old.options[option]} becomes {new.options[option]}"
            for option, name in AGREED.items()
            if old.options.get(option) != new.options.get(option)
        ]
    if changes and foreign:
        one = min(foreign)
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        yield f"{', '.join(changes)}: hosts of flannel would not follow ({one}{more})"


def overlaps_of(
    networks: Collection[IPNetwork],
    *,
    addresses: Collection[IPAddress],
    gateways: Collection[IPAddress] = (),
    registry: Collection[IPAddress] = (),
    own: Collection[IPNetwork] = (),
) -> Iterator[str]:
    """Why a Network cannot be used from here: it contains what this host needs outside the overlay.

    Args:
        networks: of the config.
        addresses: of this host's interfaces, but for the overlay's own.
        gateways: of its default routes.
        registry: of etcd.
        own: this host's subnets, inside which bridge and containers are.
    """
    for network in networks:
        for what, found in (
            ("this host's address", addresses),
            ("this host's gateway", gateways),
            ("the etcd endpoint", registry),
        ):
            for address in sorted(set(found), key=int):
                if inside(address, network) and not any(inside(address, subnet) for subnet in own):
                    yield f"Network {network} contains {what} {address}"


def is_like_a_lease(net: IPNetwork, config: NetworkConfig) -> bool:
    """Whether a prefix has the place and the size of a host's subnet, as a bridge for containers has."""
    return any(
        net.prefixlen == scope.subnet_len and inside(net.network_address, scope.network)
        for scope in config.ranges.values()
    )


def outdated_bridges(
    config: NetworkConfig, host: Host, own: Collection[IPNetwork], former: Collection[IPNetwork] = ()
) -> Mapping[IPAddress, str]:
    """Addresses of the form that a bridge for containers has, in no subnet of ours → their device.

    A lease is replaced at once, the bridge only when containers are started again.

    Args:
        config: in force.
        host: with the addresses in question.
        own: this host's subnets.
        former: Networks of earlier configs, whose subnets' sizes are not known any more.
    """
    foreign = [net for net in host.local_networks if net not in own]
    bridges = [net for net in foreign if is_like_a_lease(net, config)]
    earlier = [net for net in former if net not in config.networks]
    left = [net for net in foreign if any(_is_part(net, network) for network in earlier)]
    return {
        address: dev
        for address, dev in host.devices.items()
        if dev != host.external.name
        and any(inside(address, net) for net in (*bridges, *(left if dev in host.bridges else ())))
    }


def _is_part(net: IPNetwork, network: IPNetwork) -> bool:
    return net.prefixlen > network.prefixlen and inside(net.network_address, network)


def overlaps_of_host(
    config: NetworkConfig, host: Host, own: Collection[IPNetwork], former: Collection[IPNetwork] = ()
) -> Iterator[str]:
    """The same for a host that runs; `outdated_bridges` are another matter."""
    return overlaps_of(
        config.networks,
        addresses=host.local_addresses - outdated_bridges(config, host, own, former).keys(),
        gateways=host.gateways,
        registry=host.registry,
        own=own,
    )
