"""Which subnet a host leases: decisions by rule."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address, ip_network
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import IPAddress, PerFamily, Subnets
from flanneld_py.core.allocate import decide_lease, find_own
from flanneld_py.core.leasedecision import Adopt, Claim, Conflict, Keep, Move, Release, Wait
from flanneld_py.model import NetworkConfig, Record, SubnetRange
from tests.unit import strategies
from tests.unit.leasing import decide, record, wish
from tests.unit.strategies import by_enumeration, host, mac, snapshot_of, subnet, underlay

CONFIG_T29 = NetworkConfig(
    PerFamily(SubnetRange(IPv4Network("10.3.0.0/16"), 24, ip_address("10.3.1.0"), ip_address("10.3.25.0"))),
    "vxlan",
    {},
)


def t29_records() -> list[Record]:
    taken = [ip_network(f"10.3.{n}.0/24") for n in (1, 2, 4, 5, 31)]
    ip: PerFamily[IPAddress] = PerFamily(ip_address("1.1.1.1"))
    return [
        Record(key=f"10.3.{n.network_address.packed[2]}.0-24", subnets=PerFamily(n), public_ips=ip)
        for n in taken
    ]


@pytest.mark.parametrize("seed", range(50))
def test_t29_a_free_subnet_between_min_and_max(seed: int) -> None:
    found = decide_lease(CONFIG_T29, snapshot_of(t29_records()), host(1), wish(1), Random(seed))
    assert isinstance(found, Claim)
    third = found.wanted.subnets.v4.network_address.packed[2] if found.wanted.subnets.v4 else 0
    assert found.wanted.subnets.v4 == ip_network(f"10.3.{third}.0/24")
    assert third in set(range(1, 26)) - {1, 2, 4, 5}


def test_t30_the_same_node_keeps_its_subnet() -> None:
    first = decide_lease(CONFIG_T29, snapshot_of(t29_records()), host(1), wish(1), Random(1))
    assert isinstance(first, Claim)
    stands = replace(first.wanted, create_revision=50, mod_revision=50, etcd_lease=9)
    again = decide_lease(CONFIG_T29, snapshot_of([*t29_records(), stands]), host(1), wish(1), Random(2))
    assert again == Keep(stands)


def test_t31_a_changed_network_means_a_subnet_of_the_new_one_in_one_step() -> None:
    old = record(3, 1)
    new = replace(
        CONFIG_T29,
        ranges=PerFamily(
            SubnetRange(IPv4Network("10.4.0.0/16"), 24, ip_address("10.4.1.0"), ip_address("10.4.255.0"))
        ),
    )
    asked = wish(1, previous=(old.subnets,))
    move = decide(old, by=asked, config=new)
    assert isinstance(move, Move)
    claim = decide(by=asked, config=new)
    assert isinstance(claim, Claim)
    for found in (move, claim):
        assert found.wanted.subnets.v4 is not None
        assert ip_network("10.4.0.0/16").supernet_of(found.wanted.subnets.v4)  # type: ignore[arg-type]


def test_t33_nothing_changed_is_nothing_to_write() -> None:
    assert decide(record(3, 1), record(4, 2)) == Keep(record(3, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"public_ips": PerFamily(underlay(4, 99))},
        {"backend_type": "host-gw", "backend_data": PerFamily()},
        {"backend_data": PerFamily({"VNI": 1, "VtepMAC": mac(200)})},
    ],
    ids=["address", "backend", "mac"],
)
def test_what_changed_is_written_over_our_own_record_and_the_subnet_stays(change: dict[str, Any]) -> None:
    asked = replace(wish(1), **change)
    found = decide(record(3, 1), by=asked, local_addresses=frozenset({underlay(4, 1)}))
    assert isinstance(found, Adopt)
    assert found.record == record(3, 1)
    assert found.wanted.subnets == record(3, 1).subnets
    assert found.wanted.public_ips == asked.public_ips


def test_our_address_under_a_live_node_is_a_conflict_that_names_both() -> None:
    found = decide(record(3, 2, public_ips=PerFamily(underlay(4, 1))))
    assert isinstance(found, Conflict)
    assert found.reason == (
        "public address 192.0.2.1 is already published by node id node-2, which holds 10.5.3.0-24"
    )
    assert "--iface" in found.fix
    assert "--public-ip" in found.fix


def test_of_two_hosts_with_one_address_the_later_one_has_the_conflict() -> None:
    mine, theirs = record(3, 1), record(4, 2, public_ips=PerFamily(underlay(4, 1)))
    assert isinstance(decide(replace(mine, mod_revision=50), theirs), Conflict)
    assert decide(mine, replace(theirs, mod_revision=50)) == Keep(mine)


def test_our_address_under_a_silent_node_is_adopted_with_its_subnet() -> None:
    theirs = record(3, 2, public_ips=PerFamily(underlay(4, 1)))
    found = decide(theirs, by=wish(1, silent=frozenset({theirs.key})))
    assert isinstance(found, Adopt)
    assert (found.record, found.wanted.node_id) == (theirs, "node-1")


def test_of_several_records_with_our_address_the_oldest_counts() -> None:
    one, other = record(9, 2, create_revision=3), record(3, 3, create_revision=4)
    ours: PerFamily[IPAddress] = PerFamily(underlay(4, 1))
    records = [replace(one, public_ips=ours), replace(other, public_ips=ours)]
    for order in (records, records[::-1]):
        found = decide(*order)
        assert isinstance(found, Conflict)
        assert found.record.key == "10.5.9.0-24"


@pytest.mark.parametrize("previous", [(), (PerFamily(subnet(4, 3)),)], ids=["no subnet.env", "subnet.env"])
def test_go_flannels_record_of_this_host_is_adopted(previous: tuple[Subnets, ...]) -> None:
    gos = record(3, 1, node_id="")
    found = decide(gos, by=wish(1, previous=previous))
    assert isinstance(found, Adopt)
    assert found.record == gos
    assert found.wanted == replace(gos, node_id="node-1", create_revision=0, mod_revision=0, etcd_lease=0)


def test_peers_know_us_by_the_record_that_we_are_about_to_take_up() -> None:
    config, gos = strategies.config(), record(3, 1, node_id="")
    assert find_own(config, snapshot_of([gos]), host(1), wish(1)) == gos
    silent = wish(1, silent=frozenset({"10.5.3.0-24"}))
    for theirs in (record(3, 2), record(3, 2, public_ips=PerFamily(underlay(4, 1)))):
        assert find_own(config, snapshot_of([theirs]), host(1), wish(1)) is None
    assert find_own(config, snapshot_of([theirs]), host(1), silent) == theirs


def test_go_flannels_record_that_contradicts_subnet_env_is_not_ours() -> None:
    gos = record(3, 1, node_id="")
    found = decide(gos, by=wish(1, previous=(PerFamily(subnet(4, 9)),)))
    assert isinstance(found, Conflict)
    assert "a node without id" in found.reason


def test_the_subnet_of_the_last_run_comes_first() -> None:
    asked = wish(1, previous=(PerFamily(ip_network("10.9.1.0/24")), PerFamily(subnet(4, 88))))
    claim = decide(record(3, 2), by=asked)
    assert isinstance(claim, Claim)
    assert claim.wanted.key == "10.5.88.0-24"


@pytest.mark.parametrize("net", ["10.5.88.0/24", "10.5.88.64/26", "10.5.88.0/21"])
def test_unless_somebody_else_has_it_or_part_of_it(net: str) -> None:
    theirs = record(3, 2, subnets=PerFamily(ip_network(net)))
    claim = decide(theirs, by=wish(1, previous=(PerFamily(subnet(4, 88)),)))
    assert isinstance(claim, Claim)
    assert claim.wanted.key != "10.5.88.0-24"


def test_of_two_overlapping_leases_the_younger_host_yields() -> None:
    mine = record(3, 1, create_revision=9)
    older = record(4, 2, subnets=PerFamily(ip_network("10.5.2.0/23")), key="10.5.2.0-23", create_revision=5)
    assert decide(mine, older) == Release(
        mine, "10.5.3.0-24 overlaps the older lease 10.5.2.0-23 of 192.0.2.2"
    )
    assert decide(mine, replace(older, create_revision=10, mod_revision=10)) == Keep(mine)


def test_a_key_that_was_garbage_when_we_took_our_lease_does_not_outrank_it() -> None:
    mine = record(3, 1, create_revision=9)
    mended = record(4, 2, subnets=PerFamily(ip_network("10.5.0.0/22")), key="10.5.0.0-22", create_revision=5)
    assert decide(mine, replace(mended, mod_revision=20)) == Keep(mine)


def test_a_claim_yields_to_an_older_lease_though_that_was_changed_since() -> None:
    """Its host has not seen our claim in its way, and would not yield either."""
    mine = record(3, 1, create_revision=9)
    older = record(4, 2, subnets=PerFamily(ip_network("10.5.2.0/23")), key="10.5.2.0-23", create_revision=5)
    changed = replace(older, mod_revision=20)
    assert isinstance(decide(mine, changed, by=wish(1, written=mine)), Release)
    assert decide(mine, changed, by=wish(1, written=mine, held=mine)) == Keep(mine), "pods are in it"


@pytest.mark.parametrize("net", ["0.0.0.0/1", "10.0.0.0/8", "10.5.0.0/17"])
def test_a_key_for_half_of_everything_keeps_nobody_out(net: str) -> None:
    greedy = record(4, 2, subnets=PerFamily(ip_network(net)), key=net.replace("/", "-"), create_revision=1)
    assert isinstance(decide(greedy), Claim)
    assert decide(greedy, record(3, 1, create_revision=9)) == Keep(record(3, 1, create_revision=9))


def test_an_unreadable_key_of_another_length_is_taken_too() -> None:
    seen = replace(snapshot_of([]), bad={"10.5.88.0-22": "garbage"})
    asked = wish(1, previous=(PerFamily(subnet(4, 88)),))
    claim = decide_lease(strategies.config(), seen, host(1), asked, Random(1))
    assert isinstance(claim, Claim)
    assert claim.wanted.key != "10.5.88.0-24"


@pytest.mark.parametrize(
    "net",
    ["10.5.3.0/25", "10.5.0.0/24", "10.6.3.0/24"],
    ids=["length", "below SubnetMin", "outside"],
)
def test_a_lease_that_does_not_fit_makes_way_for_one_that_does(net: str) -> None:
    mine = record(3, 1, subnets=PerFamily(ip_network(net)))
    found = decide(mine)
    assert isinstance(found, Move)
    assert found.record is mine
    assert found.wanted.subnets.v4 in by_enumeration(strategies.config().ranges.v4, [])  # type: ignore[arg-type]


def test_a_lease_that_does_not_fit_stays_while_nothing_is_free() -> None:
    """Peers reach us by it: it goes only in the same step in which another one comes."""
    mine, theirs = record(3, 1), record(1, 2)
    one = strategies.config(subnets=1)
    found = decide(mine, theirs, config=one)
    assert isinstance(found, Wait)
    assert found.held is mine
    assert "gives 1 subnet of /24 (10.5.1.0 to 10.5.1.0), 1 lease stands" in found.reason
    free = decide(mine, config=one)
    assert isinstance(free, Move)
    assert free.wanted.subnets == theirs.subnets


def test_a_lease_that_does_not_fit_makes_way_for_one_held_before() -> None:
    mine = record(3, 1, subnets=PerFamily(ip_network("10.6.3.0/24")))
    found = decide(mine, by=wish(1, previous=(mine.subnets, PerFamily(subnet(4, 77)))))
    assert isinstance(found, Move)
    assert found.wanted.subnets.v4 == subnet(4, 77)


def test_none_free_says_how_many_there_are() -> None:
    found = decide(record(1, 2), record(2, 3), config=strategies.config(subnets=2))
    assert isinstance(found, Wait)
    assert found.reason.startswith(
        "no free subnet: 10.5.0.0/16 gives 2 subnets of /24 (10.5.1.0 to 10.5.2.0), 2 leases stand"
    )
    assert "SubnetMax" in found.fix


def test_the_hosts_own_networks_are_not_handed_out() -> None:
    local = (ip_network("10.5.1.0/24"), ip_network("10.5.2.128/25"))
    claim = decide(config=strategies.config(subnets=3), local_networks=local)
    assert isinstance(claim, Claim)
    assert claim.wanted.key == "10.5.3.0-24"
    found = decide(config=strategies.config(subnets=2), local_networks=local)
    assert isinstance(found, Wait)
    assert "0 leases stand and the rest overlaps this host's own networks" in found.reason


def test_a_family_without_a_public_address_is_waited_for() -> None:
    found = decide(config=strategies.config(families=(4, 6)))
    assert isinstance(found, Wait)
    assert "IPv6" in found.reason


def test_addresses_of_a_family_that_is_not_in_use_are_not_published() -> None:
    asked = wish(1, families=(4, 6))
    claim = decide(by=asked)
    assert isinstance(claim, Claim)
    assert (claim.wanted.public_ips.v6, claim.wanted.backend_data.v6) == (None, None)
    stands = replace(claim.wanted, create_revision=5)
    assert decide(stands, by=asked) == Keep(stands)
