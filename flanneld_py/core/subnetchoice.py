"""Which subnets a host may have: what the config allows, what is taken, and one of what is left."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_network
from random import Random
from typing import TypeAlias

from msgspec.structs import replace

from flanneld_py.addresses import Family, IPNetwork, PerFamily, Subnets
from flanneld_py.core.freesubnets import count_subnets, random_free
from flanneld_py.core.leasedecision import Claim, Wait, Wish
from flanneld_py.core.records import parse_key
from flanneld_py.core.subnets import leasable
from flanneld_py.errors import RecordError
from flanneld_py.model import Host, NetworkConfig, Record, Snapshot, SubnetRange

Chosen: TypeAlias = dict[Family, IPNetwork]
"""A subnet of some families."""


def is_compatible(record: Record, config: NetworkConfig) -> bool:
    """Whether it has a subnet that the config allows in each family in use, and no other."""
    found = fitting(record.subnets, config, reserved=not record.etcd_lease)
    return per_family(found) == record.subnets and set(found) == set(config.families)


def fitting(subnets: Subnets, config: NetworkConfig, *, reserved: bool = False) -> Chosen:
    """Those of the families in use that the config allows.

    What an operator has `reserved` may lie outside SubnetMin to SubnetMax, from which hosts help themselves.
    """
    return {
        family: subnet
        for family, subnet in subnets.items()
        if (allowed := config.ranges.get(family)) is not None
        and subnet.prefixlen == allowed.subnet_len
        and (subnet.network_address in allowed.network if reserved else _in_range(subnet, allowed))
    }


def _in_range(subnet: IPNetwork, allowed: SubnetRange) -> bool:
    return int(allowed.subnet_min) <= int(subnet.network_address) <= int(allowed.subnet_max)


def overlap(one: Subnets, other: Subnets) -> bool:
    return Around(one).meets(other)


class Around:
    """Tells which of many overlap some subnets."""

    def __init__(self, subnets: Subnets) -> None:
        self._v4 = _span(subnets.v4)
        self._v6 = _span(subnets.v6)

    def meets(self, other: Subnets) -> bool:
        v4, v6 = other.v4, other.v6
        return (v4 is not None and _lies_across(v4, self._v4)) or (
            v6 is not None and _lies_across(v6, self._v6)
        )


def _span(subnet: IPNetwork | None) -> tuple[int, int]:
    """First and last address; of nothing an empty span."""
    if subnet is None:
        return 0, -1
    return int(subnet.network_address), int(subnet.broadcast_address)


def _lies_across(subnet: IPNetwork, span: tuple[int, int]) -> bool:
    base, (first, last) = int(subnet.network_address), span
    # Half of them are done with one comparison; to ask for the length of one costs more.
    return base <= last and (base >= first or base + (1 << subnet.max_prefixlen - subnet.prefixlen) > first)


def may_be_leased(subnets: Subnets, config: NetworkConfig) -> bool:
    """Whether they can have come from the Network at all; what cannot keeps nobody out."""
    v4, v6 = config.ranges.v4, config.ranges.v6
    return (v4 is not None and subnets.v4 is not None and leasable(subnets.v4, v4.network)) or (
        v6 is not None and subnets.v6 is not None and leasable(subnets.v6, v6.network)
    )


def taken_subnets(snapshot: Snapshot, config: NetworkConfig) -> list[Subnets]:
    """Subnets that have a key: leased, or with a value we cannot read and held all the same, perhaps."""
    found = [record.subnets for record in snapshot.records.values()]
    for key in snapshot.bad.keys() - snapshot.records.keys():
        with suppress(RecordError):
            found.append(parse_key(key))
    return [subnets for subnets in found if may_be_leased(subnets, config)]


def taken_besides(own: Record, snapshot: Snapshot, config: NetworkConfig) -> list[Subnets]:
    """The same as if `own` were not there."""
    others = {key: record for key, record in snapshot.records.items() if key != own.key}
    return taken_subnets(replace(snapshot, records=others), config)


def previous_subnets(config: NetworkConfig, taken: Sequence[Subnets], wish: Wish) -> Chosen:
    """What can be had again of the subnets we once held: all of a set rather than part of a newer one."""
    usable: list[Chosen] = [
        {
            family: net
            for family, net in fitting(subnets, config).items()
            if not any(map(Around(per_family({family: net})).meets, taken))
        }
        for subnets in wish.previous
    ]
    return max(usable, key=len, default={})


def claim(
    config: NetworkConfig, taken: Sequence[Subnets], host: Host, wish: Wish, rng: Random, kept: Chosen
) -> Claim | Wait:
    """The subnets in `kept`, and of each other family a random free one of the whole range."""
    chosen = dict(kept)
    for family, allowed in config.ranges.items():
        if family in chosen:
            continue
        leased = [net for subnets in taken if (net := subnets.get(family)) is not None]
        subnet = random_free(allowed, [*leased, *_here(host)], rng)
        if subnet is None:
            return _none_free(allowed, len(leased))
        chosen[family] = subnet
    return Claim(wish.record(per_family(chosen), host.node_id))


def _here(host: Host) -> list[IPNetwork]:
    """What must stay reachable as it is: the host's networks, its gateways and etcd."""
    return [*host.local_networks, *(ip_network(address) for address in (*host.gateways, *host.registry))]


def _none_free(allowed: SubnetRange, leased: int) -> Wait:
    total = count_subnets(allowed)
    rest = " and the rest overlaps this host's own networks" if leased < total else ""
    gives = f"{total} subnet{'s' * (total != 1)} of /{allowed.subnet_len}"
    stand = f"{leased} leases stand" if leased != 1 else "1 lease stands"
    return Wait(
        f"no free subnet: {allowed.network} gives {gives} ({allowed.subnet_min} to {allowed.subnet_max}), "
        f"{stand}{rest}",
        "release leases of hosts that are gone (flannelctl leases), or widen Network or SubnetMax",
    )


def per_family(chosen: Chosen) -> Subnets:
    return PerFamily(v4=chosen.get(4), v6=chosen.get(6))
