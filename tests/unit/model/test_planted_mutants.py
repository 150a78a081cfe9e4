"""The explorer finds what it is for: each fault planted in the daemon ends in a history that shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from flanneld_py.core import allocate, leaseproof, subnetchoice
from flanneld_py.core.leaseproof import is_proven
from flanneld_py.daemon import leasekeeper, leasewriter
from flanneld_py.daemon.leaseground import Ground
from flanneld_py.drivers import etcd as driver
from flanneld_py.drivers import etcdrpc, etcdtxn
from tests.unit.model import scenarios
from tests.unit.model.explorer import Found, explore
from tests.unit.model.scenarios import clones, hosts

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.core.leasedecision import Wish
    from flanneld_py.model import Host, Record
    from tests.unit.model.world import Scenario

LOST, TWO_OWNERS, OVER, FOR_GOOD = "has lost", "two live owners", "writes over", "stands for good"
BELIEF, STUCK, LEFT, FOR_EVER = "believes", "come to a lease", "nobody uses", "write for ever"


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Any], None]:
    return monkeypatch.setattr


def found_in(scenario: Scenario, *wrongs: str) -> Found:
    """What is found must be one of these."""
    found = explore(scenario, most=60_000)
    assert any(wrong in found.wrong for wrong in wrongs), str(found)
    assert found.path, "the way there is told"
    return found


def always(key: bytes, *_: Any) -> Any:
    """A guard that holds whatever is there."""
    return etcdrpc.Compare(
        key=key, target=etcdrpc.Compare.MOD, result=etcdrpc.Compare.GREATER, mod_revision=-1
    )


# --- guards -----------------------------------------------------------------------------------------


def test_a_claim_without_its_guard(plant: Callable[[Any, str, Any], None]) -> None:
    plant(etcdtxn, "absent", always)
    found = found_in(hosts(2, 2), OVER)
    assert found.path[-1].endswith(": done"), "the write that does the harm"


def test_a_change_without_its_guard(plant: Callable[[Any, str, Any], None]) -> None:
    plant(etcdtxn, "unchanged", always)
    found_in(hosts(2, 2, 2, "lag", "starve"), OVER)


def test_a_record_outside_its_etcd_lease(plant: Callable[[Any, str, Any], None]) -> None:
    put = etcdtxn.put
    plant(etcdtxn, "put", lambda key, value, _lease: put(key, value, 0))
    found_in(hosts(1, 2), FOR_GOOD)


# --- whose it is ------------------------------------------------------------------------------------


def test_adoption_by_node_id_alone(plant: Callable[[Any, str, Any], None]) -> None:
    def by_name(record: Record, host: Host, wish: Wish) -> bool:
        return is_proven(record, wish) or record.node_id == host.node_id

    plant(allocate, "is_ours", by_name)
    found_in(clones(), OVER, LOST)


def test_adoption_by_address_alone(plant: Callable[[Any, str, Any], None]) -> None:
    plant(allocate, "may_take", lambda _record, _wish: True)
    found_in(scenarios.ONE_ADDRESS, OVER, LOST)


def test_a_host_that_counts_as_gone_leaves_its_etcd_lease_to_its_successor(
    plant: Callable[[Any, str, Any], None],
) -> None:
    """When it came back, that lease proved to it that the record was still its own."""
    plant(allocate, "is_left", lambda _record, _wish: False)
    found_in(scenarios.ONE_ADDRESS, OVER)


def test_a_clone_remembers_the_record_of_its_original(plant: Callable[[Any, str, Any], None]) -> None:
    """It had asked for the same key and come too late."""

    def at_that_key(writer: leasewriter.LeaseWriter, snapshot: Any) -> Record | None:
        return None if writer.written is None else snapshot.records.get(writer.written.key)

    plant(leasewriter.LeaseWriter, "shown", at_that_key)
    found_in(clones(1, "kill"), OVER)


def test_a_clone_does_not_know_what_it_wrote_under_its_old_name(
    plant: Callable[[Any, str, Any], None],
) -> None:
    def but_for_the_lease(record: Record, wish: Wish) -> bool:
        return is_proven(record, replace(wish, granted=0))

    plant(leaseproof, "is_proven", but_for_the_lease)
    found_in(clones(1, "kill"), STUCK)


# --- overlaps ---------------------------------------------------------------------------------------


def test_overlap_is_not_looked_at(plant: Callable[[Any, str, Any], None]) -> None:
    plant(subnetchoice.Around, "meets", lambda _self, _other: False)
    found_in(scenarios.TWO_FAMILIES, TWO_OWNERS)


def test_the_younger_of_two_that_overlap_does_not_yield(plant: Callable[[Any, str, Any], None]) -> None:
    plant(allocate, "_older_overlap", lambda *_: None)
    found_in(scenarios.TWO_FAMILIES, TWO_OWNERS)


def test_a_claim_does_not_yield_to_an_older_lease_that_was_changed_since(
    plant: Callable[[Any, str, Any], None],
) -> None:
    older = allocate._older_overlap

    def as_if_held(ours: Any, snapshot: Any, config: Any, wish: Wish) -> Record | None:
        return older(ours, snapshot, config, replace(wish, written=None))

    plant(allocate, "_older_overlap", as_if_held)
    found_in(scenarios.MOVED, TWO_OWNERS)


# --- what the keeper sees ---------------------------------------------------------------------------


def test_a_second_record_of_ours_is_not_looked_at(plant: Callable[[Any, str, Any], None]) -> None:
    """Of a claim whose answer was lost, that was carried out all the same."""
    plant(Ground, "_has_second", False)
    found_in(hosts(2, 3, 2, "lag", "lose"), LEFT)


def test_the_loss_of_the_record_is_not_noticed(plant: Callable[[Any, str, Any], None]) -> None:
    must = leasekeeper.LeaseKeeper._must_decide

    def until_held(keeper: leasekeeper.LeaseKeeper, ground: Ground) -> bool:
        return ground.lease.own is None and must(keeper, ground)

    plant(leasekeeper.LeaseKeeper, "_must_decide", until_held)
    found_in(hosts(1, 2, 1, "starve"), BELIEF)


def test_the_end_of_an_etcd_lease_is_not_noticed(plant: Callable[[Any, str, Any], None]) -> None:
    plant(driver.EtcdRegistry, "keep_alive", lambda _registry, _lease: 86_400)
    found_in(hosts(1, 2, 1, "starve"), FOR_EVER, STUCK, BELIEF)


def test_a_lease_that_is_held_is_not_renewed(plant: Callable[[Any, str, Any], None]) -> None:
    plant(leasekeeper.LeaseKeeper, "_renewed", lambda _keeper, _own: None)
    found_in(hosts(1, 2), LOST)
