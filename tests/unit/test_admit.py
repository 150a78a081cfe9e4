"""Which records become peers, compared with a slow twin that looks at every pair."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, ip_address, ip_network
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.admit import Peers, admit
from flanneld_py.model import Family, Host, NetworkConfig, PerFamily, Record, SubnetRange
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


@dataclass(frozen=True)
class World:
    """All that `admit` is told."""

    records: tuple[Record, ...]
    own: Record = OWN
    config: NetworkConfig = field(default_factory=strategies.config)
    here: Host = field(default_factory=lambda: host(1))
    departed: tuple[Record, ...] = ()
    """Records that have just left the registry."""


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
    return World(tuple(records), own, strategies.config("vxlan", families), host(1, families), departed)


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


# --- by example -----------------------------------------------------------------------------------


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


def reason(*records: Record, here: Host | None = None) -> str:
    """Why the last of them is rejected."""
    peers = screened(World((OWN, *records), here=here or host(1)))
    return peers.rejected.get(records[-1].key, "")


def test_blameless_records_are_accepted_oldest_first() -> None:
    records = [peer(number) for number in (5, 3, 9)]
    assert screened(World((*records, OWN))) == Peers((records[1], records[0], records[2]), {})


@pytest.mark.parametrize("net", ["10.5.3.0/24", "10.5.3.128/25", "10.5.2.0/23", "10.5.3.4/30"])
def test_of_two_overlapping_subnets_the_older_stays(net: str) -> None:
    older, younger = peer(3), peer(9, subnets=PerFamily(ip_network(net)))
    assert reason(older, younger) == f"subnet {net} overlaps the older lease peer-3"
    assert reason(younger, replace(older, create_revision=99)).endswith("overlaps the older lease peer-9")


def test_of_two_equally_old_the_lower_key_stays() -> None:
    one, other = peer(3, create_revision=5), peer(4, create_revision=5, subnets=PerFamily(subnet(4, 3)))
    assert screened(World((other, one, OWN))).accepted == (one,)


@pytest.mark.parametrize("net", ["10.5.1.0/24", "10.5.1.0/25", "10.5.1.255/32", "10.5.0.0/23", "10.5.0.0/16"])
@pytest.mark.parametrize("lost", [False, True], ids=["in the registry", "lost"])
@pytest.mark.parametrize("revision", [1, 99])
def test_our_subnet_is_never_anothers(net: str, lost: bool, revision: int) -> None:
    thief = peer(9, subnets=PerFamily(ip_network(net)), create_revision=revision)
    peers = screened(World((thief,) if lost else (thief, OWN)))
    assert peers.accepted == ()
    if net == "10.5.0.0/16":
        assert peers.rejected == {"peer-9": "subnet 10.5.0.0/16 is too large for the Network 10.5.0.0/16"}
    else:
        assert peers.rejected == {"peer-9": f"subnet {net} overlaps our own lease own"}


def test_another_owner_of_our_key_is_no_peer() -> None:
    thief = replace(OWN, node_id="thief", public_ips=PerFamily(underlay(4, 9)), vtep_macs=PerFamily(mac(9)))
    assert screened(World((thief,))) == Peers()


@pytest.mark.parametrize("net", ["10.5.0.0/16", "10.5.0.0/17", "10.5.128.0/17"])
def test_a_subnet_too_large_for_a_lease(net: str) -> None:
    assert reason(peer(9, subnets=PerFamily(ip_network(net)))) == (
        f"subnet {net} is too large for the Network 10.5.0.0/16"
    )


@pytest.mark.parametrize("net", ["10.6.1.0/24", "10.4.0.0/15", "0.0.0.0/1", "192.0.2.0/24"])
def test_a_subnet_outside_the_network(net: str) -> None:
    assert reason(peer(9, subnets=PerFamily(ip_network(net)))) == (
        f"subnet {net} lies outside the Network 10.5.0.0/16"
    )


def test_a_subnet_around_the_network() -> None:
    wide = SubnetRange(IPv4Network("10.4.0.0/16"), 24, ip_address("10.4.1.0"), ip_address("10.4.255.0"))
    own = replace(OWN, subnets=PerFamily(ip_network("10.4.1.0/24")))
    greedy = peer(9, subnets=PerFamily(ip_network("10.4.0.0/15")))
    config = replace(strategies.config(), ranges=PerFamily(wide))
    assert screened(World((own, greedy), own, config)).rejected == {
        "peer-9": "subnet 10.4.0.0/15 lies outside the Network 10.4.0.0/16"
    }


@pytest.mark.parametrize(
    ("public", "said"),
    [
        ("10.5.7.1", "public address 10.5.7.1 lies inside the Network 10.5.0.0/16: it could not be reached"),
        ("192.0.2.1", "public address 192.0.2.1 is this host's own"),
        ("192.0.2.200", "public address 192.0.2.200 is this host's own"),
        ("203.0.113.1", "public address 203.0.113.1 is this host's own"),
    ],
)
def test_a_public_address_that_cannot_be_a_peers(public: str, said: str) -> None:
    here = host(1)
    external = replace(here.external, public=PerFamily(ip_address("203.0.113.1")))
    more = frozenset({ip_address("192.0.2.200")})
    here = replace(here, external=external, local_addresses=here.local_addresses | more)
    assert reason(peer(9, public_ips=PerFamily(ip_address(public))), here=here) == said


def test_no_public_address() -> None:
    assert reason(peer(9, public_ips=PerFamily())) == "subnet 10.5.9.0/24 comes without a public IPv4 address"


@pytest.mark.parametrize(("backend_type", "said"), [("host-gw", "host-gw"), ("", "udp or alloc")])
def test_another_backend(backend_type: str, said: str) -> None:
    assert reason(peer(9, backend_type=backend_type)) == f"backend is {said}, this host's is vxlan"


def test_a_mac_that_is_taken() -> None:
    said = "VTEP MAC 02:00:00:00:00:03 belongs to the lease peer-3"
    assert reason(peer(3), peer(9, vtep_macs=PerFamily(mac(3)))) == said
    assert "belongs to the lease own" in reason(peer(2, vtep_macs=PerFamily(mac(1))))


def test_an_old_lease_that_takes_on_anothers_mac_does_not_take_its_traffic() -> None:
    thief = peer(2, vtep_macs=PerFamily(mac(3)), mod_revision=50)
    peers = screened(World((OWN, thief, peer(3))))
    assert peers.accepted == (peer(3),)
    assert peers.rejected == {"peer-2": "VTEP MAC 02:00:00:00:00:03 belongs to the lease peer-3"}


def test_a_network_the_host_is_connected_to_is_no_peers() -> None:
    pods, docker = ip_network("10.5.1.0/24"), ip_network("10.5.9.0/24")
    outside = (ip_network("10.0.0.0/8"), ip_network("172.17.0.0/16"))
    here = replace(host(1), local_networks=(pods, docker, *outside))
    assert reason(peer(9), here=here) == "subnet 10.5.9.0/24 overlaps this host's own network 10.5.9.0/24"
    assert reason(peer(8), here=here) == ""


def test_one_mac_for_both_families_of_one_host_is_no_clash() -> None:
    both = peer(9, vtep_macs=PerFamily(mac(9), mac(9)))
    assert reason(both) == ""


def test_a_rejected_record_takes_nothing_from_others() -> None:
    unusable = peer(2, subnets=PerFamily(subnet(4, 3)), backend_type="host-gw", vtep_macs=PerFamily(mac(3)))
    assert reason(unusable, peer(3)) == ""


def test_a_family_that_is_not_ours_is_no_fault() -> None:
    dual = peer(
        9,
        subnets=PerFamily(subnet(4, 9), ip_network("2001:db8:ffff::/64")),
        public_ips=PerFamily(underlay(4, 9)),
    )
    assert reason(dual) == ""


def test_our_own_departed_record_is_no_peer() -> None:
    ours = peer(7, node_id="node-1")
    assert screened(World((OWN,), departed=(ours, replace(OWN, key="was"), peer(8, node_id="")))) == Peers(
        (peer(8, node_id=""),), {}
    )


def test_ten_thousand_records_are_not_compared_pair_by_pair() -> None:
    base = int(ip_address("10.5.16.0"))
    numbers = range(256, 10_256)
    world = World(tuple(peer(n, subnets=PerFamily(ip_network((base + 4 * n, 30)))) for n in numbers))
    start = time.process_time()
    assert len(screened(world).accepted) == 10_000
    # Usually 0.1 s; fifty million pairs take a hundred times longer.
    assert time.process_time() - start < 4
