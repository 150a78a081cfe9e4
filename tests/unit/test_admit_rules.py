"""Which records become peers: each rule by an example, with the reason as an operator reads it."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address, ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.admit import Peers, admit
from flanneld_py.model import Host, Record, SubnetRange
from tests.unit import strategies
from tests.unit.strategies import host, mac, snapshot_of, subnet, underlay
from tests.unit.test_admit import OWN, OWN_DUAL, World, peer, screened


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
        ("203.0.113.2", None),
    ],
)
def test_a_public_address_that_cannot_be_a_peers(public: str, said: str | None) -> None:
    """What we publish is ours; not so what a flag demands, and another host publishes still."""
    here, own = host(1), replace(OWN, public_ips=PerFamily(ip_address("203.0.113.1")))
    external = replace(here.external, public=PerFamily(ip_address("203.0.113.2")))
    more = frozenset({ip_address("192.0.2.200")})
    here = replace(here, external=external, local_addresses=here.local_addresses | more)
    theirs = peer(9, public_ips=PerFamily(ip_address(public)))
    assert screened(World((own, theirs), own=own, here=here)).rejected.get(theirs.key) == said


@pytest.mark.parametrize("address", [underlay(4, 1), ip_address("192.0.2.200")])
def test_our_own_next_record_is_no_strangers(address: Any) -> None:
    """It is in the registry a moment before it is held; the address may have changed with it."""
    fresh = replace(
        OWN, key="10.6.9.0-24", subnets=PerFamily(ip_network("10.6.9.0/24")), public_ips=PerFamily(address)
    )
    here = host(1, local_addresses=frozenset({underlay(4, 1), ip_address("192.0.2.200")}))
    assert screened(World((OWN, fresh), here=here)) == Peers()
    assert screened(World((fresh,), here=here)) == Peers()
    elsewhere = replace(fresh, public_ips=PerFamily(underlay(4, 7)))
    assert screened(World((OWN, elsewhere), here=here)).rejected.keys() == {fresh.key}, "a clone's"
    nobodys = replace(fresh, node_id="")
    assert screened(World((OWN, nobodys), here=here)).rejected.keys() == {fresh.key}


def test_no_public_address() -> None:
    assert reason(peer(9, public_ips=PerFamily())) == "subnet 10.5.9.0/24 comes without a public IPv4 address"


@pytest.mark.parametrize(("backend_type", "said"), [("host-gw", "host-gw"), ("", "udp or alloc")])
def test_another_backend(backend_type: str, said: str) -> None:
    assert (
        reason(peer(9, backend_type=backend_type, etcd_lease=7)) == f"backend is {said}, this host's is vxlan"
    )


def test_a_host_of_udp_takes_the_type_udp_as_well_as_none() -> None:
    """Flannel's udp writes none; nor does it look."""
    typed, world = peer(9, backend_type="udp"), World(())
    assert admit(snapshot_of((typed,)), None, world.config, None, "").accepted == (typed,)
    assert admit(snapshot_of((typed,)), None, world.config, None, "vxlan").rejected.keys() == {typed.key}


def test_a_mac_that_is_taken() -> None:
    said = "VTEP MAC 02:00:00:00:00:03 belongs to the lease peer-3"
    assert reason(peer(3), peer(9, vtep_macs=PerFamily(mac(3)))) == said
    assert "belongs to the lease own" in reason(peer(2, vtep_macs=PerFamily(mac(1))))


def test_whoever_writes_its_record_anew_keeps_its_mac() -> None:
    renewed = peer(3, mod_revision=70, since_revision=3)
    thief = peer(9, vtep_macs=PerFamily(mac(3)))
    assert screened(World((OWN, thief, renewed))).accepted == (renewed,)


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


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ("local_addresses", "contains this host's address 10.5.9.1"),
        ("gateways", "contains this host's gateway 10.5.9.1"),
        ("registry", "contains the etcd endpoint 10.5.9.1"),
    ],
)
def test_a_subnet_that_would_cut_this_host_off(facts: str, said: str) -> None:
    some: dict[str, Any] = {facts: frozenset({ip_address("10.5.9.1"), ip_address("2001:db8::7")})}
    here = replace(host(1), **some)
    assert reason(peer(9), here=here) == f"subnet 10.5.9.0/24 {said}"
    assert reason(peer(8), here=here) == ""


def test_what_lies_in_our_own_subnet_is_our_pods() -> None:
    here = replace(host(1), gateways=frozenset({ip_address("10.5.1.1")}))
    assert reason(peer(9), here=here) == ""
    assert reason(peer(9, subnets=PerFamily(subnet(4, 1))), here=here).endswith("overlaps our own lease own")


def test_the_broadcast_address_of_the_segment() -> None:
    assert reason(peer(9, public_ips=PerFamily(ip_address("192.0.2.255")))) == (
        "public address 192.0.2.255 is the broadcast address of 192.0.2.0/24"
    )
    point_to_point = replace(host(1), local_networks=(ip_network("192.0.2.8/31"),))
    assert reason(peer(9, public_ips=PerFamily(ip_address("192.0.2.9"))), here=point_to_point) == ""


def test_a_record_bad_in_one_family_is_left_out_as_a_whole() -> None:
    bad = peer(
        9,
        subnets=PerFamily(subnet(4, 9), ip_network("fd00:9::/64")),
        public_ips=PerFamily(underlay(4, 9), underlay(6, 9)),
    )
    config = strategies.config("vxlan", (4, 6))
    found = screened(World((OWN_DUAL, bad), OWN_DUAL, config, host(1, (4, 6))))
    assert found.accepted == ()
    assert found.rejected == {"peer-9": "subnet fd00:9::/64 lies outside the Network fd00:5::/48"}


def test_halves_of_dual_stack_keys_overlap_like_any() -> None:
    older = peer(3, subnets=PerFamily(subnet(4, 3), subnet(6, 3)))
    for half in (PerFamily(subnet(4, 3), subnet(6, 9)), PerFamily(subnet(4, 9), subnet(6, 3))):
        younger = peer(9, subnets=half)
        assert reason(older, younger).endswith("overlaps the older lease peer-3")


def test_two_at_one_address_both_stay_and_the_younger_is_named() -> None:
    both = (peer(3), peer(9, public_ips=PerFamily(underlay(4, 3))))
    assert screened(World((OWN, *both))) == Peers(
        both, {}, {"peer-9": "public address 192.0.2.3 is also that of the older lease peer-3"}
    )


def test_a_reservation_keeps_its_subnet_and_is_nobody() -> None:
    reserved = peer(2, subnets=PerFamily(subnet(4, 3)), backend_type="", vtep_macs=PerFamily())
    assert screened(World((OWN, reserved))) == Peers()
    assert reason(reserved, peer(3)) == "subnet 10.5.3.0/24 overlaps the older lease peer-2"
    assert reason(replace(reserved, public_ips=PerFamily(underlay(4, 1)))) == "", "it is for this host"
    outside = replace(reserved, subnets=PerFamily(ip_network("10.6.1.0/24")))
    assert "lies outside the Network" in reason(outside)


def test_judged_by_no_host_in_particular() -> None:
    records = (peer(1), peer(3), peer(9, subnets=PerFamily(subnet(4, 3))), peer(7, backend_type="host-gw"))
    found = admit(snapshot_of(records), None, strategies.config(), None, "vxlan")
    assert found.accepted == records[:2]
    assert found.rejected == {
        "peer-9": "subnet 10.5.3.0/24 overlaps the older lease peer-3",
        "peer-7": "backend is host-gw, the config's is vxlan",
    }


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
