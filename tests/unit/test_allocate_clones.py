"""Machines are cloned, ids, state and all: whose record it is, and who takes another node id."""

from __future__ import annotations

from msgspec.structs import replace

from flanneld_py.addresses import IPAddress, PerFamily
from flanneld_py.core.allocate import find_own
from flanneld_py.core.leasedecision import Adopt, Conflict, Keep, Release, Rename
from tests.unit import strategies
from tests.unit.leasing import decide, record, wish
from tests.unit.strategies import host, snapshot_of, underlay

ELSEWHERE: PerFamily[IPAddress] = PerFamily(underlay(4, 77))
CLONED = "node id node-1 is also used by 192.0.2.77, which holds 10.5.3.0-24"


def test_a_new_address_after_a_restart_is_proven_by_the_etcd_lease() -> None:
    mine = record(3, 1, public_ips=ELSEWHERE, etcd_lease=42)
    assert isinstance(decide(mine, by=wish(1, etcd_lease=42)), Adopt)
    assert decide(mine, by=wish(1, etcd_lease=43)) == Rename(mine, CLONED)


def test_with_a_node_id_given_by_the_operator_it_is_a_conflict_that_names_both() -> None:
    mine = record(3, 1, public_ips=ELSEWHERE)
    found = decide(mine, by=wish(1, fixed_id=True))
    assert isinstance(found, Conflict)
    assert found.reason == CLONED
    assert "--node-id" in found.fix


def test_a_record_without_etcd_lease_is_proven_by_its_key() -> None:
    mine = record(3, 1, public_ips=ELSEWHERE, etcd_lease=0)
    assert isinstance(decide(mine), Rename)
    assert isinstance(decide(mine, by=wish(1, last_key="10.5.4.0-24")), Rename)
    assert isinstance(decide(mine, by=wish(1, last_key=mine.key, etcd_lease=42)), Rename)
    assert isinstance(decide(mine, by=wish(1, last_key=mine.key)), Adopt)


def test_another_node_id_on_the_same_machine_takes_its_record_along() -> None:
    mine = replace(record(3, 1, etcd_lease=42), node_id="former-id")
    assert isinstance(decide(mine), Conflict), "it names our address"
    found = decide(mine, by=wish(1, etcd_lease=42))
    assert isinstance(found, Adopt)
    assert found.wanted.node_id == "node-1"
    found = decide(mine, by=wish(1, held=mine))
    assert isinstance(found, Adopt)
    assert decide(replace(mine, mod_revision=50), by=wish(1, held=mine)) != found


def test_a_clone_that_fell_silent_is_taken_over() -> None:
    mine = record(3, 1, public_ips=ELSEWHERE)
    assert isinstance(decide(mine, by=wish(1, silent=frozenset({mine.key}))), Adopt)


def test_a_record_under_our_node_id_from_elsewhere_does_not_keep_us_from_our_own() -> None:
    mine = record(3, 1)
    younger = record(4, 1, public_ips=ELSEWHERE)
    assert decide(mine, younger) == Keep(mine)


def test_of_two_that_claimed_at_once_the_later_one_takes_another_id() -> None:
    mine, older = record(3, 1), record(2, 1, public_ips=ELSEWHERE)
    assert decide(mine, older) == Rename(older, CLONED.replace("10.5.3", "10.5.2"))
    assert decide(mine, older, by=wish(1, fixed_id=True)) == Keep(mine)


def test_what_a_clone_wrote_over_our_record_is_not_taken_back() -> None:
    held = record(3, 1)
    stolen = replace(held, public_ips=ELSEWHERE, mod_revision=20)
    asked = wish(1, held=held, etcd_lease=held.etcd_lease)
    found = decide(stolen, by=asked)
    assert isinstance(found, Conflict)
    assert "our subnet 10.5.3.0/24 is now held by 192.0.2.77 (node id node-1, 10.5.3.0-24)" in found.reason
    assert isinstance(decide(stolen, by=replace(asked, on_loss="renumber")), Rename)


def test_our_own_new_address_is_written_over_the_record_we_hold() -> None:
    held = record(3, 1, public_ips=ELSEWHERE)
    assert isinstance(decide(held, by=wish(1, held=held)), Adopt)


def test_what_we_wrote_is_ours_although_the_address_has_changed_again_since() -> None:
    held = record(3, 1)
    written = replace(held, public_ips=ELSEWHERE)
    seen = replace(written, mod_revision=20)
    assert isinstance(decide(seen, by=wish(1, held=held, written=written)), Adopt)
    assert isinstance(decide(seen, by=wish(1, held=held, written=held)), Conflict)


def test_of_two_leases_of_our_own_the_older_is_kept() -> None:
    first, second = record(3, 1), record(4, 1)
    assert decide(second, first) == Release(
        second, "10.5.4.0-24 is a second lease of this host beside 10.5.3.0-24"
    )
    config, seen = strategies.config(), snapshot_of([second, first])
    assert find_own(config, seen, host(1), wish(1)) == first
    assert find_own(config, seen, host(2), wish(2)) is None


def test_a_reservation_is_no_second_lease() -> None:
    first, second = record(3, 1), record(4, 1, etcd_lease=0)
    assert decide(second, first) == Keep(first)


def test_what_bears_the_etcd_lease_of_our_claim_is_ours_under_whatever_name() -> None:
    """A claim whose answer was lost, written before we took another node id."""
    late = record(3, 1, node_id="node-before", etcd_lease=9)
    found = decide(late, by=wish(1, granted=9))
    assert found == Adopt(late, wish(1).record(late.subnets, "node-1"))
    assert isinstance(decide(late), Conflict), "else nobody could tell"


def test_what_is_taken_over_leaves_the_etcd_lease_of_the_host_that_is_gone() -> None:
    """When that comes back, the etcd lease in its state file must not prove the record to be its own."""
    left = record(3, 2, public_ips=wish(1).public_ips)
    found = decide(left, by=wish(1, silent=frozenset({left.key})))
    assert found == Adopt(left, wish(1).record(left.subnets, "node-1"), from_silent=True)
    mine = record(3, 1, node_id="node-before")
    assert decide(mine, by=wish(1, etcd_lease=7)) == Adopt(mine, wish(1).record(mine.subnets, "node-1"))
