"""Which records become peers, compared with a slow twin that looks at every pair."""

from __future__ import annotations

import time
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.addresses import FAMILIES, Family, PerFamily
from flanneld_py.core.admit import Peers, admit
from flanneld_py.model import Host, NetworkConfig, Record
from tests.unit import strategies
from tests.unit.strategies import (
    NETWORKS,
    clashing_records,
    host,
    mac,
    snapshot_of,
    subnet,
    thorough,
    underlay,
)

OWN = Record(
    key="own",
    subnets=PerFamily(subnet(4, 1)),
    public_ips=PerFamily(underlay(4, 1)),
    backend_type="vxlan",
    vtep_macs=PerFamily(mac(1)),
    node_id="node-1",
    create_revision=4,
)
OWN_DUAL = replace(
    OWN,
    subnets=PerFamily(subnet(4, 1), subnet(6, 1)),
    public_ips=PerFamily(underlay(4, 1), underlay(6, 1)),
    vtep_macs=PerFamily(mac(1), mac(2)),
)


class World(Struct, frozen=True):
    """All that `admit` is told."""

    records: tuple[Record, ...]
    own: Record = OWN
    config: NetworkConfig = field(default_factory=strategies.config)
    here: Host = field(default_factory=lambda: host(1))
    departed: tuple[Record, ...] = ()
    """Records that have just left the registry."""


def peer(number: int, **more: Any) -> Record:
    """A blameless record."""
    given_: dict[str, Any] = {
        "key": f"peer-{number}",
        "subnets": PerFamily(subnet(4, number)),
        "public_ips": PerFamily(underlay(4, number)),
        "backend_type": "vxlan",
        "vtep_macs": PerFamily(mac(number)),
        "create_revision": number,
        "mod_revision": number,
    }
    return Record(**{**given_, **more})


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Records in which much clashes; our own is among them, or lost."""
    families: tuple[Family, ...] = draw(st.sampled_from(((4,), (4, 6))))
    own = OWN if families == (4,) else OWN_DUAL
    names = [f"r{number}" for number in range(draw(st.integers(0, 7)))]
    records = [draw(clashing_records(name, families)) for name in names]
    if draw(st.booleans()):
        records.insert(draw(st.integers(0, len(records))), own)
    gone = draw(st.sets(st.sampled_from(["gone1", "gone2", "r0", "r1"]), max_size=2))
    departed = tuple(draw(clashing_records(name, families)) for name in sorted(gone))
    here = replace(
        host(1, families),
        **{
            field: frozenset(draw(st.sets(INSIDE, max_size=1))) | getattr(host(1, families), field)
            for field in ("local_addresses", "gateways", "registry")
        },
    )
    return World(tuple(records), own, strategies.config("vxlan", families), here, departed)


INSIDE = st.sampled_from(
    [subnet(family, number).network_address + 9 for family in FAMILIES for number in (1, 2, 4)]
)
"""Addresses inside the Network that the host may have to reach: in our own subnet, and in others'."""


def screened(world: World) -> Peers:
    return admit(snapshot_of(world.records), world.own, world.config, world.here, "vxlan", world.departed)


def twin(world: World) -> list[str]:
    """The keys to accept, oldest first: the rules as the documentation words them, pair by pair."""
    holders: list[Record] = []
    present = {record.key for record in world.records}
    gone = [r for r in world.departed if r.key not in present and r.node_id != world.own.node_id]
    for record in [*sorted(world.records, key=age), *sorted(gone, key=age)]:
        if record.key == world.own.key or record.backend_type != "vxlan":
            continue
        if any(harms(record, family, world.here) for family, _ in world.config.ranges.items()):
            continue
        if harms_host(record, world):
            continue
        if not any(overlap(record, older) for older in [world.own, *holders]):
            holders.append(record)
    by_mac = [world.own, *sorted(holders, key=lambda r: (r.key not in present, r.mod_revision, r.key))]
    return [r.key for r in holders if not any(one_mac(r, earlier) for earlier in by_mac[: by_mac.index(r)])]


def age(record: Record) -> tuple[int, str]:
    return record.create_revision, record.key


def harms(record: Record, family: Family, here: Host) -> bool:
    net, public, network = record.subnets.get(family), record.public_ips.get(family), NETWORKS[family]
    if net is None:
        return False
    mine = here.external.public.get(family)
    too_large = net.prefixlen < network.prefixlen + 2
    return too_large or not _within(net, network) or public is None or public in network or public == mine


def _within(net: Any, network: Any) -> bool:
    return bool(net.subnet_of(network))


def overlap(one: Record, other: Record) -> bool:
    return any(
        a.version == b.version and a.overlaps(b) for a in one.subnets.values() for b in other.subnets.values()
    )


def harms_host(record: Record, world: World) -> bool:
    """Whether it covers an address that this host must go on reaching as it does."""
    here, own = world.here, world.own
    needed = here.local_addresses | here.gateways | here.registry
    kept = [ip for ip in needed if any(_holds(net, ip) for net in world.config.networks)]
    kept = [ip for ip in kept if not any(_holds(net, ip) for net in own.subnets.values())]
    return any(_holds(net, ip) for net in record.subnets.values() for ip in kept)


def _holds(net: Any, ip: Any) -> bool:
    return net.version == ip.version and ip in net


def one_mac(one: Record, other: Record) -> bool:
    return bool(set(one.vtep_macs.values()) & set(other.vtep_macs.values()))


def clash(one: Record, other: Record) -> bool:
    return overlap(one, other) or one_mac(one, other)


# --- properties -----------------------------------------------------------------------------------


@thorough
@given(worlds())
def test_as_the_slow_twin(world: World) -> None:
    peers = screened(world)
    assert [record.key for record in peers.accepted] == twin(world)
    others, gone = {r.key for r in world.records} - {"own"}, {r.key for r in world.departed}
    assert {record.key for record in peers.accepted} - (gone - others) | set(peers.rejected) == others
    assert not {record.key for record in peers.accepted} & set(peers.rejected)
    assert all(peers.rejected.values())


@thorough
@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(world: World, random: Random) -> None:
    records = tuple(random.sample(world.records, len(world.records)))
    departed = tuple(random.sample(world.departed, len(world.departed)))
    assert screened(replace(world, records=records, departed=departed)) == screened(world)


@thorough
@given(worlds())
def test_none_of_the_accepted_harms_us_or_each_other(world: World) -> None:
    accepted = screened(world).accepted
    for number, record in enumerate(accepted):
        assert not clash(record, world.own)
        assert world.here.external.public.v4 not in record.public_ips.values()
        assert not any(clash(record, other) for other in accepted[:number])
        assert record in (*world.records, *world.departed)


@thorough
@given(worlds(), clashing_records("newcomer"))
def test_a_newcomer_never_displaces_anybody(world: World, newcomer: Record) -> None:
    # The departed make room for anybody.
    world = replace(world, departed=())
    before = screened(world).accepted
    records = (*world.records, replace(newcomer, create_revision=99, mod_revision=99))
    assert screened(replace(world, records=records)).accepted[: len(before)] == before


@thorough
@given(worlds())
def test_the_departed_displace_nobody_and_are_not_complained_of(world: World) -> None:
    with_them, without = screened(world), screened(replace(world, departed=()))
    assert with_them.accepted[: len(without.accepted)] == without.accepted
    assert with_them.rejected == without.rejected


# --- effort ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [False, True], ids=["all good", "all overlap, and many lengths"])
def test_the_effort_is_linear(bad: bool) -> None:
    """Quadratic work would take 64 times as long for 8 times the records."""
    base = int(ip_address("10.5.16.0"))

    def seconds(count: int) -> float:
        nets = [
            ip_network((base, 20 + n % 13)) if bad else ip_network((base + 4 * n, 30))
            for n in range(256, 256 + count)
        ]
        world = World(tuple(peer(n, subnets=PerFamily(net)) for n, net in enumerate(nets, 256)))
        start = time.process_time()
        assert len(screened(world).accepted) == (1 if bad else count)
        return time.process_time() - start

    small = min(seconds(1_000) for _ in range(5))
    large = min(seconds(8_000) for _ in range(5))
    assert large < 32 * small
