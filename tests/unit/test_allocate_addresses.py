"""A host's new address that another host publishes still: who may write it, and who has the conflict."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import permutations
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import Family, IPAddress, PerFamily
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.leasedecision import Adopt, Conflict, Keep
from flanneld_py.model import Host, Record
from tests.unit import strategies
from tests.unit.leasing import decide, record, wish
from tests.unit.strategies import host, per_family, snapshot_of, subnet, underlay
from tests.unit.test_allocate_races import Etcd

MINE, THEIRS = record(3, 1), record(4, 2)
LEFT: PerFamily[IPAddress] = PerFamily(underlay(4, 77))
OURS: PerFamily[IPAddress] = PerFamily(underlay(4, 1))
TOLD = "public address 192.0.2.1 is already published by node id node-2, which holds 10.5.4.0-24"


def test_a_host_that_has_left_its_address_names_the_new_one_whoever_else_does() -> None:
    mine, theirs = replace(MINE, public_ips=LEFT), replace(THEIRS, public_ips=OURS)
    found = decide(mine, theirs, by=wish(1, held=mine))
    assert isinstance(found, Adopt)
    assert (found.record, found.wanted.key, found.wanted.public_ips) == (mine, mine.key, OURS)
    after = replace(mine, public_ips=OURS, mod_revision=60)
    conflict = decide(after, theirs, by=wish(1, held=after))
    assert isinstance(conflict, Conflict)
    assert (conflict.reason, conflict.held) == (TOLD, after)
    moved = replace(theirs, public_ips=LEFT, mod_revision=61)
    assert decide(after, moved, by=wish(1, held=after)) == Keep(after)
    silent = wish(1, held=after, silent=frozenset({theirs.key}))
    assert decide(after, theirs, by=silent) == Keep(after)


def test_a_host_that_has_its_address_still_does_not_take_on_anothers() -> None:
    mine, theirs = replace(MINE, public_ips=LEFT), replace(THEIRS, public_ips=OURS, mod_revision=50)
    both = frozenset((underlay(4, 1), underlay(4, 77)))
    found = decide(mine, theirs, by=wish(1, held=mine), local_addresses=both)
    assert isinstance(found, Conflict)
    assert (found.reason, found.held) == (TOLD, mine)
    silent = wish(1, held=mine, silent=frozenset({theirs.key}))
    assert isinstance(decide(mine, theirs, by=silent, local_addresses=both), Adopt)


def test_an_address_given_by_a_flag_is_not_taken_from_another_host() -> None:
    """Behind NAT no address shows whether the flag is right, and the old one still works if it is not."""
    mine, theirs = replace(MINE, public_ips=LEFT), replace(THEIRS, public_ips=OURS)
    inner = frozenset({underlay(4, 9)})
    found = decide(mine, theirs, by=wish(1, held=mine), local_addresses=inner)
    assert isinstance(found, Conflict)
    assert (found.reason, found.held) == (TOLD, mine)


def test_without_a_lease_anothers_address_is_not_published() -> None:
    found = decide(replace(THEIRS, public_ips=OURS))
    assert isinstance(found, Conflict)
    assert (found.reason, found.held) == (TOLD, None)


def test_an_address_that_is_disputed_in_one_family_is_followed_in_the_other() -> None:
    families: tuple[Family, ...] = (4, 6)
    config = strategies.config(families=families)

    def dual(number: int, holder: int, **more: Any) -> Record:
        made = wish(holder, families).record(
            per_family({f: subnet(f, number) for f in families}), f"node-{holder}"
        )
        return replace(made, **{"create_revision": number, "mod_revision": number, "etcd_lease": 7, **more})

    theirs = dual(4, 2, public_ips=PerFamily(underlay(4, 1), underlay(6, 2)))
    mine = dual(5, 1, public_ips=PerFamily(underlay(4, 1), ip_address("2001:db8::77")))
    seen = snapshot_of([mine, theirs])
    found = decide_lease(config, seen, host(1, families), wish(1, families, held=mine), Random(1))
    assert isinstance(found, Adopt)
    assert found.wanted.public_ips.v6 == underlay(6, 1)


# --- hosts that change places ---------------------------------------------------------------------


def at(node: int, address: int) -> Host:
    """A host whose id does not follow from its address."""
    return replace(host(address), node_id=f"node-{node}")


def turn(etcd: Etcd, node: int, address: int) -> object:
    """What a host that holds its lease, and has this address now, does next."""
    seen = etcd.snapshot()
    held = next(r for r in seen.records.values() if r.node_id == f"node-{node}")
    found = decide_lease(strategies.config(), seen, at(node, address), wish(address, held=held), Random(1))
    if isinstance(found, Adopt):
        assert found.record == held, "only its own"
        assert etcd.replace(found.record, found.wanted)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_that_swap_their_addresses_all_end_with_the_new_ones(count: int) -> None:
    nodes = range(1, count + 1)
    for order in permutations(nodes):
        etcd = Etcd.of(snapshot_of([record(node, node) for node in nodes]))
        for node in (*order, *order):
            turn(etcd, node, node % count + 1)
        for node in nodes:
            assert isinstance(turn(etcd, node, node % count + 1), Keep)
        places = {r.node_id: r.public_ips.v4 for r in etcd.snapshot().records.values()}
        assert places == {f"node-{node}": underlay(4, node % count + 1) for node in nodes}
        assert {r.key for r in etcd.snapshot().records.values()} == {record(n, n).key for n in nodes}


def test_of_two_that_really_have_one_address_the_one_that_came_to_it_has_the_conflict() -> None:
    etcd = Etcd.of(snapshot_of([record(1, 1), record(2, 2)]))
    assert isinstance(turn(etcd, 2, 1), Adopt)
    for _ in range(3):
        assert isinstance(turn(etcd, 1, 1), Keep)
        found = turn(etcd, 2, 1)
        assert isinstance(found, Conflict)
        assert "192.0.2.1 is already published by node id node-1, which holds 10.5.1.0-24" in found.reason


def test_in_the_place_of_a_host_of_flannel_nothing_but_our_own_record_is_written() -> None:
    gos = record(2, 2, node_id="")
    etcd = Etcd.of(snapshot_of([record(1, 1), gos]))
    before = etcd.entries[gos.key]
    assert isinstance(turn(etcd, 1, 2), Adopt)
    assert isinstance(turn(etcd, 1, 2), Keep)
    assert etcd.entries[gos.key] == before
