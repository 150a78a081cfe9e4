"""Records without etcd lease: they never end, wait for their host, and are nobody's to delete."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.allocate import find_own
from flanneld_py.core.leasedecision import Adopt, Claim, Conflict, Keep, Move
from flanneld_py.core.reservation import is_vacant
from flanneld_py.model import Record
from tests.unit import strategies
from tests.unit.leasing import decide, record, wish
from tests.unit.strategies import host, snapshot_of, subnet, underlay

MINE = PerFamily(underlay(4, 1))


def reserved(number: int, **more: Any) -> Record:
    """As flannelctl writes it for a host to come."""
    return replace(
        record(number, 1, etcd_lease=0),
        **{"node_id": "", "backend_type": "", "backend_data": PerFamily(), "public_ips": MINE, **more},
    )


def test_what_waits_for_a_host_and_what_is_taken() -> None:
    assert is_vacant(reserved(3), "vxlan")
    assert not is_vacant(record(3, 1, etcd_lease=0), "vxlan")
    assert not is_vacant(reserved(3, etcd_lease=7), "vxlan")
    assert not is_vacant(reserved(3), ""), "where records bear no type, it cannot be told"


@pytest.mark.parametrize("node_id", ["", "node-1"])
@pytest.mark.parametrize("number", [3, 0], ids=["in range", "below SubnetMin"])
def test_a_host_takes_what_is_reserved_for_its_address_and_completes_it(node_id: str, number: int) -> None:
    kept = reserved(number, node_id=node_id)
    previous = wish(1, previous=(PerFamily(subnet(4, 88)),))
    for asked in (wish(1), previous):
        found = decide(kept, record(7, 2), by=asked)
        assert isinstance(found, Adopt)
        assert found.record == kept
        assert found.wanted == replace(
            record(number, 1), create_revision=0, mod_revision=0, etcd_lease=0, key=kept.key
        )
    stands = replace(record(number, 1), etcd_lease=0, key=kept.key, subnets=kept.subnets)
    assert decide(stands) == Keep(stands)


def test_by_node_id_it_is_taken_under_another_address_too() -> None:
    found = decide(reserved(3, node_id="node-1", public_ips=PerFamily(underlay(4, 50))))
    assert isinstance(found, Adopt)
    assert found.wanted.public_ips == MINE


def test_a_host_that_holds_a_lease_keeps_that() -> None:
    mine = record(4, 1)
    for kept in (reserved(3), reserved(3, node_id="node-1"), reserved(3, node_id="other")):
        assert decide(mine, kept) == Keep(mine)
        assert find_own(strategies.config(), snapshot_of([mine, kept]), host(1), wish(1)) == mine


def test_go_flannels_lease_of_this_host_comes_first_too() -> None:
    gos = record(4, 1, node_id="")
    found = decide(gos, reserved(3))
    assert isinstance(found, Adopt)
    assert found.record == gos


def test_reserved_for_our_address_and_another_node_id_is_a_conflict() -> None:
    found = decide(reserved(3, node_id="node-9"))
    assert isinstance(found, Conflict)
    assert "10.5.3.0-24 is reserved for our public address 192.0.2.1, but for node id node-9" in found.reason
    assert "--node-id node-9" in found.fix


def test_nobody_else_takes_it() -> None:
    kept = reserved(3, public_ips=PerFamily(underlay(4, 50)))
    found = decide(kept, by=wish(1, previous=(kept.subnets,)))
    assert isinstance(found, Claim)
    assert found.wanted.key != kept.key


@pytest.mark.parametrize("net", ["10.6.3.0/24", "10.5.3.0/25"])
def test_one_that_does_not_fit_the_config_is_left_alone(net: str) -> None:
    for node_id in ("", "node-1"):
        odd = reserved(3, node_id=node_id, subnets=PerFamily(ip_network(net)), key=net.replace("/", "-"))
        assert isinstance(decide(odd), Claim)
        taken = replace(odd, backend_type="vxlan", backend_data=record(3, 1).backend_data, node_id="node-1")
        claim = decide(taken)
        assert isinstance(claim, Claim)
        stands = replace(claim.wanted, create_revision=50, mod_revision=50, etcd_lease=9)
        assert decide(taken, stands) == Keep(stands), "and it is no second lease either"


def test_with_ipv6_switched_on_it_moves_and_stays_a_reservation() -> None:
    mine = record(3, 1, etcd_lease=0)
    dual = strategies.config(families=(4, 6))
    found = decide(mine, by=wish(1, (4, 6)), config=dual)
    assert isinstance(found, Move)
    assert found.record.etcd_lease == 0


def test_one_that_overlaps_an_older_lease_is_a_conflict_and_not_deleted() -> None:
    mine = record(3, 1, etcd_lease=0, create_revision=9, mod_revision=9)
    older = record(4, 2, subnets=PerFamily(ip_network("10.5.2.0/23")), key="10.5.2.0-23", create_revision=5)
    found = decide(mine, replace(older, mod_revision=5))
    assert isinstance(found, Conflict)
    assert "the reservation 10.5.3.0-24 overlaps the older lease 10.5.2.0-23" in found.reason
