"""Our subnet held by somebody else: hold, renumber or exit, as the operator wants."""

from __future__ import annotations

from ipaddress import ip_network
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.leasedecision import (
    Adopt,
    Claim,
    Conflict,
    End,
    Keep,
    Move,
    Rename,
    Restore,
    Wait,
    Wish,
)
from flanneld_py.model import Record
from tests.unit import strategies
from tests.unit.leasing import decide, record, wish
from tests.unit.strategies import host, snapshot_of, subnet, underlay

HELD = record(3, 1)
TAKEN = record(3, 2, create_revision=20, mod_revision=20)
REASON = "our subnet 10.5.3.0/24 is now held by 192.0.2.2 (node id node-2, 10.5.3.0-24)"


def after(**more: Any) -> Wish:
    """What host 1 wants after it has held 10.5.3.0/24."""
    return wish(1, held=HELD, previous=(HELD.subnets,), etcd_lease=HELD.etcd_lease, **more)


def test_hold_waits_and_names_the_holder() -> None:
    found = decide(TAKEN, by=after())
    assert isinstance(found, Conflict)
    assert found.reason == REASON
    assert "flannelctl leases release" in found.fix


def test_hold_claims_the_same_subnet_as_soon_as_it_is_free() -> None:
    found = decide(record(4, 2), by=after())
    assert isinstance(found, Claim)
    assert found.wanted.key == HELD.key


def test_renumber_claims_another_at_once() -> None:
    found = decide(TAKEN, by=after(on_loss="renumber"))
    assert isinstance(found, Claim)
    assert found.wanted.key != HELD.key


def test_exit_ends_the_process() -> None:
    found = decide(TAKEN, by=after(on_loss="exit"))
    assert isinstance(found, End)
    assert found.reason == REASON


@pytest.mark.parametrize("net", ["10.5.3.128/25", "10.5.2.0/23"])
@pytest.mark.parametrize("on_loss", ["hold", "exit"])
def test_part_of_it_is_lost_as_well(net: str, on_loss: Any) -> None:
    part = replace(TAKEN, subnets=PerFamily(ip_network(net)), key=net.replace("/", "-"))
    assert isinstance(decide(part, by=after(on_loss=on_loss)), Conflict | End)


def test_a_key_for_half_of_everything_takes_it_from_nobody() -> None:
    greedy = replace(TAKEN, subnets=PerFamily(ip_network("10.0.0.0/8")), key="10.0.0.0-8")
    found = decide(greedy, by=after())
    assert isinstance(found, Claim)
    assert found.wanted.key == HELD.key


@pytest.mark.parametrize("on_loss", ["hold", "renumber"])
def test_with_our_address_in_it_the_address_is_the_matter(on_loss: Any) -> None:
    taken = replace(TAKEN, public_ips=PerFamily(underlay(4, 1)))
    found = decide(taken, by=after(on_loss=on_loss))
    assert isinstance(found, Conflict)
    assert "public address 192.0.2.1 is already published by node id node-2" in found.reason


@pytest.mark.parametrize("on_loss", ["hold", "renumber", "exit"])
def test_go_flannel_on_this_host_has_not_taken_it_from_us(on_loss: Any) -> None:
    gos = replace(TAKEN, node_id="", public_ips=PerFamily(underlay(4, 1)))
    assert isinstance(decide(gos, by=after(on_loss=on_loss)), Adopt)


def test_a_clone_that_took_it() -> None:
    stolen = replace(HELD, public_ips=PerFamily(underlay(4, 77)), mod_revision=20)
    assert isinstance(decide(stolen, by=after()), Conflict)
    assert isinstance(decide(stolen, by=after(on_loss="renumber")), Rename)
    assert isinstance(decide(stolen, by=after(on_loss="exit")), End)


def test_a_record_of_an_earlier_time_makes_way_for_the_lease_that_is_held() -> None:
    """As a registry shows that was restored from a backup; containers have addresses of the later one."""
    earlier = record(4, 1, etcd_lease=9)
    found = decide(earlier, record(5, 2), by=after())
    assert isinstance(found, Move)
    assert (found.record, found.wanted.key) == (earlier, HELD.key)
    assert decide(earlier, TAKEN, by=after()) == Keep(earlier), "somebody else has it by now"
    assert decide(replace(earlier, etcd_lease=0), by=after()) == Keep(replace(earlier, etcd_lease=0))
    assert decide(earlier, by=wish(1, previous=(HELD.subnets,))) == Keep(earlier), "in etcd, not in memory"


def unreadable(asked: Wish, *records: Record, key: str = HELD.key) -> object:
    """What host 1 does while somebody's garbage stands at the key."""
    seen = replace(snapshot_of(records), bad={key: "garbage"})
    return decide_lease(strategies.config(), seen, host(1), asked, Random(1))


@pytest.mark.parametrize("on_loss", ["hold", "renumber", "exit"])
def test_what_was_written_over_our_record_and_cannot_be_read_is_put_right(on_loss: Any) -> None:
    assert unreadable(after(on_loss=on_loss)) == Restore(
        replace(HELD, create_revision=0, mod_revision=0, vtep_macs=PerFamily())
    )


@pytest.mark.parametrize("etcd_lease", [0, 9])
def test_so_it_is_after_a_restart_and_a_reservation_stays_one(etcd_lease: int) -> None:
    asked = wish(1, last_key=HELD.key, previous=(HELD.subnets,), etcd_lease=etcd_lease)
    found = unreadable(asked, record(4, 2))
    assert isinstance(found, Restore)
    assert (found.wanted.key, found.wanted.node_id) == (HELD.key, "node-1")
    assert found.wanted.etcd_lease == etcd_lease


def test_but_not_where_it_would_harm_somebody_or_could_not_be_read_again() -> None:
    asked = wish(1, last_key=HELD.key, previous=(HELD.subnets,), etcd_lease=9)
    wider = replace(TAKEN, subnets=PerFamily(ip_network("10.5.2.0/23")), key="10.5.2.0-23")
    elsewhere = [
        unreadable(asked, wider),
        unreadable(replace(asked, last_key="")),
        unreadable(replace(asked, foreign=frozenset({HELD.key}))),
        unreadable(replace(asked, last_key=""), key=""),
    ]
    for found in elsewhere:
        assert isinstance(found, Claim)
    dual = f"{HELD.key}&fd00:5:0:3::-64"
    assert isinstance(unreadable(replace(asked, last_key=dual), key=dual), Claim)
    assert unreadable(asked, record(4, 1)) == Keep(record(4, 1)), "another lease is held"


def test_a_key_that_somebody_else_keeps_alive_is_not_fled_from() -> None:
    theirs = frozenset({HELD.key})
    waits = unreadable(after(foreign=theirs))
    assert isinstance(waits, Wait)
    assert "10.5.3.0-24, that cannot be read" in waits.reason
    assert isinstance(unreadable(after(foreign=theirs, on_loss="renumber")), Claim)


def test_a_subnet_that_the_config_allows_no_more_is_given_up() -> None:
    longer = strategies.config(halves=True)
    part = replace(TAKEN, subnets=PerFamily(ip_network("10.5.3.0/25")), key="10.5.3.0-25")
    assert isinstance(decide(part, by=after(), config=longer), Claim)


@pytest.mark.parametrize("on_loss", ["hold", "renumber", "exit"])
def test_what_we_hold_is_kept_whatever_the_policy(on_loss: Any) -> None:
    others: list[Record] = [record(4, 2), record(5, 3, subnets=PerFamily(subnet(4, 5)))]
    assert decide(HELD, *others, by=after(on_loss=on_loss)) == Keep(HELD)
