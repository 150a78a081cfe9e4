"""Which peers stay although their record has left the registry, and for how long."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.admit import admit
from flanneld_py.core.linger import (
    RECLAIM_SECONDS,
    WIPE_GRACE,
    Departures,
    departures,
    departures_since,
)
from flanneld_py.model import Record, Snapshot
from tests.unit import strategies
from tests.unit.strategies import host, mac, subnet, underlay

NOW = 1000.0
NOBODY = Departures()


def peer(number: int, *, key: str = "", at: int = 0) -> Record:
    return Record(
        key=key or f"10.5.{number}.0-24",
        subnets=PerFamily(subnet(4, number)),
        public_ips=PerFamily(underlay(4, number)),
        backend_type="vxlan",
        vtep_macs=PerFamily(mac(number)),
        node_id=f"node-{number}",
        create_revision=at or number,
    )


OWN = peer(200)


def seen(revision: int, *records: Record, epoch: int = 0) -> Snapshot:
    """With our own record, which is always there."""
    return Snapshot(revision, 7, {record.key: record for record in (OWN, *records)}, epoch=epoch)


def left(
    earlier: Departures, last: Snapshot, fresh: Snapshot, now: float, grace: float = WIPE_GRACE
) -> Departures:
    return departures(earlier, last, fresh, last.records.keys() - {OWN.key}, now, grace)


def until(departed: Departures) -> dict[str, float]:
    """Key → for how long, from NOW."""
    return {key: gone.until - NOW for key, gone in departed.kept.items()}


def keys(records: Collection[Record]) -> set[str]:
    return {record.key for record in records}


A, B, C = peer(1), peer(2), peer(3)


def test_a_deleted_peer_stays_for_a_moment() -> None:
    gone = left(NOBODY, seen(5, A, B), seen(6, A), NOW)
    assert gone.records == [B]
    assert until(gone) == {B.key: RECLAIM_SECONDS}
    assert gone.held == []
    unchanged = seen(6, A)
    assert left(gone, unchanged, unchanged, NOW + RECLAIM_SECONDS - 0.1) == gone
    assert until(left(gone, unchanged, unchanged, NOW + RECLAIM_SECONDS)) == {}


def test_time_does_not_begin_anew_with_every_snapshot() -> None:
    gone = left(NOBODY, seen(5, A, B), seen(6, A), NOW)
    assert left(gone, seen(6, A), seen(7, A, C), NOW + 1) == gone


def test_our_own_record_is_no_peer() -> None:
    without = Snapshot(6, 7, {A.key: A})
    assert until(left(NOBODY, seen(5, A), without, NOW)) == {}
    # Three peers, and ours: not more than three.
    peers = [peer(number) for number in range(1, 4)]
    assert left(NOBODY, seen(5, *peers), Snapshot(6, 7), NOW).held == []


def test_what_was_no_peer_does_not_depart_and_does_not_count() -> None:
    """Reservations of nobody and records that were left out come and go in great numbers."""
    others = [peer(number) for number in range(11, 31)]
    last = seen(5, A, B, *others)
    gone = departures(NOBODY, last, seen(6, A), {A.key, B.key}, NOW, WIPE_GRACE)
    assert (gone.records, gone.held, set(gone.vanished)) == ([B], [], {B.key})
    wiped = departures(NOBODY, last, seen(6, epoch=1), {A.key, B.key}, NOW, WIPE_GRACE)
    assert set(wiped.held) == {A.key, B.key}
    # Nor do they make a wipe of peers look small.
    four = [peer(number) for number in range(1, 5)]
    many = departures(NOBODY, seen(5, *four, *others), seen(6, *others), keys(four), NOW, WIPE_GRACE)
    assert set(many.held) == keys(four)


def test_whoever_is_back_is_not_gone() -> None:
    gone = left(NOBODY, seen(5, A, B), seen(6, A), NOW)
    assert until(left(gone, seen(6, A), seen(7, A, replace(B, create_revision=7)), NOW + 0.1)) == {}
    assert until(left(gone, seen(6, A), seen(7, A, replace(C, key=B.key)), NOW + 0.1)) == {}


@pytest.mark.parametrize("nameless", [False, True], ids=["ours", "Go's"])
@pytest.mark.parametrize("named_again", [False, True], ids=["", "with a node id"])
def test_a_peer_that_claims_another_subnet_is_back(*, nameless: bool, named_again: bool) -> None:
    wiped = [replace(peer(number), node_id="") if nameless else peer(number) for number in range(1, 9)]
    gone = left(NOBODY, seen(5, *wiped), seen(6), NOW)
    assert len(gone.held) == 8
    moved = peer(1, key="10.5.77.0-24", at=7)
    moved = replace(moved, subnets=PerFamily(subnet(4, 77)), node_id="node-1" if named_again else "")
    if not nameless:
        moved = replace(moved, public_ips=PerFamily(underlay(4, 78)) if named_again else moved.public_ips)
    back = left(gone, seen(6), seen(7, moved), NOW + 1)
    assert set(back.kept) == keys(wiped) - {A.key}
    # Also when both are seen at once.
    assert set(left(NOBODY, seen(5, *wiped), seen(7, moved), NOW).kept) == keys(wiped) - {A.key}


def test_another_host_at_the_same_address_is_not_the_one_that_left() -> None:
    gone = left(NOBODY, seen(5, A, B), seen(6, A), NOW)
    neighbour = replace(peer(9), public_ips=B.public_ips)
    assert set(left(gone, seen(6, A), seen(7, A, neighbour), NOW + 0.1).kept) == {B.key}


def test_peers_stay_longer_when_etcd_lost_its_data() -> None:
    others = [peer(number) for number in range(4, 9)]
    many = left(NOBODY, seen(50, A, *others), seen(60, A, epoch=1), NOW)
    one_more = left(many, seen(60, A, epoch=1), seen(61, epoch=1), NOW)
    assert until(one_more) == dict.fromkeys(keys(others), WIPE_GRACE) | {A.key: RECLAIM_SECONDS}
    gone = left(NOBODY, seen(50, A, B), seen(60, epoch=1), NOW)
    assert until(gone) == {A.key: WIPE_GRACE, B.key: WIPE_GRACE}
    back = left(gone, seen(60, epoch=1), seen(61, A, epoch=1), NOW + 5)
    assert until(back) == {B.key: WIPE_GRACE}
    # What is deleted from the new etcd is deleted.
    later = left(back, seen(61, A, epoch=1), seen(62, epoch=1), NOW + 6)
    assert until(later) == {A.key: 6 + RECLAIM_SECONDS, B.key: WIPE_GRACE}


WIPES = [(4, 3, False), (4, 4, True), (20, 4, False), (20, 5, True), (100, 20, False), (100, 21, True)]
"""Peers, of these gone, whether that is a wipe: more than three of them, and more than a fifth."""


@pytest.mark.parametrize(("known", "gone", "held"), WIPES)
def test_many_peers_deleted_together_stay_longer(known: int, gone: int, *, held: bool) -> None:
    peers = [peer(number) for number in range(1, known + 1)]
    departed = left(NOBODY, seen(5, *peers), seen(6, *peers[gone:]), NOW)
    assert until(departed) == dict.fromkeys(keys(peers[:gone]), WIPE_GRACE if held else RECLAIM_SECONDS)
    assert set(departed.held) == (keys(peers[:gone]) if held else set())


@pytest.mark.parametrize(
    ("grace", "kept_for"), [(0.0, RECLAIM_SECONDS), (1.0, RECLAIM_SECONDS), (300.0, 300.0)]
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_grace_is_the_operators(grace: float, kept_for: float, epoch: int) -> None:
    peers = [peer(number) for number in range(1, 11)]
    departed = left(NOBODY, seen(5, *peers), seen(6, epoch=epoch), NOW, grace)
    assert until(departed) == dict.fromkeys(keys(peers), kept_for)
    assert bool(departed.held) == (grace > 0)


def delete_one_by_one(count: int, every: float) -> Departures:
    """What is kept after the last of `count` deletions among ten peers, the first of them at NOW."""
    peers = [peer(number) for number in range(1, 11)]
    departed = NOBODY
    for number in range(count):
        last, fresh = (seen(10 + n, *peers[n:]) for n in (number, number + 1))
        departed = left(departed, last, fresh, NOW + number * every)
    return departed


def test_many_peers_deleted_one_after_the_other_stay_longer() -> None:
    assert until(delete_one_by_one(3, 0.5))[peer(3).key] == 1 + RECLAIM_SECONDS
    assert set(until(delete_one_by_one(4, 0.5)).values()) == {1.5 + WIPE_GRACE}
    many = delete_one_by_one(10, 0.5)
    assert many.kept.keys() == {peer(number).key for number in range(1, 11)}
    assert min(until(many).values()) >= WIPE_GRACE


def test_a_slow_wipe_is_one_though_its_first_victims_have_gone() -> None:
    """Four in ten seconds, of which no two were there at a time."""
    assert delete_one_by_one(3, 3).held == []
    assert delete_one_by_one(4, 3).held == [peer(4).key]
    assert delete_one_by_one(6, 3).held == [peer(4).key, peer(5).key, peer(6).key]


def test_peers_deleted_now_and_then_do_not_add_up() -> None:
    assert until(delete_one_by_one(10, 5)) == {peer(10).key: 9 * 5 + RECLAIM_SECONDS}
    # Long after a wipe of which some are still kept, a single deletion is one.
    peers = [peer(number) for number in range(1, 11)]
    wiped = left(NOBODY, seen(5, *peers), seen(6, *peers[5:]), NOW)
    later = left(wiped, seen(6, *peers[5:]), seen(7, *peers[6:]), NOW + 30)
    assert until(later) == until(wiped) | {peer(6).key: 30 + RECLAIM_SECONDS}


def test_one_peer_that_comes_and_goes_is_no_wipe() -> None:
    departed, away, there = NOBODY, seen(5, A, B), seen(5, A)
    for number in range(10):
        departed = left(departed, away, there, NOW + number)
        departed = left(departed, there, away, NOW + number)
    assert left(departed, away, there, NOW + 10).held == []


def test_a_claim_ends_the_stay_after_a_wipe() -> None:
    peers = [peer(number) for number in range(1, 11)]
    wiped = left(NOBODY, seen(5, *peers), seen(6), NOW)
    back = replace(peers[0], create_revision=7)
    taken = replace(peer(77), key=peers[1].key)
    later = left(wiped, seen(6), seen(8, back, taken), NOW + 1)
    assert later.kept == {record.key: wiped.kept[record.key] for record in peers[2:]}


def test_nothing_is_gone_when_nothing_happened() -> None:
    first = seen(5, A)
    assert left(NOBODY, first, first, NOW) == NOBODY


def test_the_departed_never_stand_in_the_way_of_the_living() -> None:
    own = peer(9)
    moved = replace(B, key="10.5.4.0-24", subnets=PerFamily(subnet(4, 4)), create_revision=90)
    taken_over = replace(peer(5, key="10.5.3.0-24", at=91), subnets=PerFamily(subnet(4, 3)))
    ours_before = replace(own, key="10.5.8.0-24", subnets=PerFamily(subnet(4, 8)))
    peers = admit(
        Snapshot(91, 7, {r.key: r for r in (own, moved, taken_over)}),
        own,
        strategies.config("vxlan", (4,)),
        host(9),
        "vxlan",
        departed=[A, B, C, ours_before],
    )
    assert peers.accepted == (moved, taken_over, A)
    assert peers.rejected == {}


# --- against the last run ---------------------------------------------------------------------------


def since(last_run: Snapshot, fresh: Snapshot, grace: float = WIPE_GRACE) -> Departures:
    return departures_since(last_run, fresh, OWN.key, NOW, grace)


@pytest.mark.parametrize(("known", "gone", "held"), WIPES)
def test_a_wipe_before_the_start_holds_what_the_last_run_had(known: int, gone: int, *, held: bool) -> None:
    peers = [peer(number) for number in range(1, known + 1)]
    departed = since(seen(5, *peers), seen(6, *peers[gone:]))
    assert until(departed) == (dict.fromkeys(keys(peers[:gone]), WIPE_GRACE) if held else {})
    assert until(since(seen(5, *peers), seen(6, *peers[gone:]), grace=0)) == {}


def test_an_etcd_that_holds_nothing_of_what_it_did_has_lost_its_data_though_it_has_as_many_revisions() -> (
    None
):
    last_run, fresh = seen(50, A, B), seen(90, replace(A, create_revision=A.create_revision + 60))
    created = {record.key: record.create_revision for record in (A, B)}
    assert until(departures_since(last_run, fresh, OWN.key, NOW, WIPE_GRACE, (), created)) == {
        B.key: WIPE_GRACE
    }
    assert until(departures_since(last_run, seen(90, A), OWN.key, NOW, WIPE_GRACE, (), created)) == {}


def test_an_etcd_that_lost_its_data_before_the_start_holds_every_peer() -> None:
    last_run = seen(50, A, B)
    for other in (seen(6, A), replace(seen(60, A), cluster_id=8)):
        assert until(since(last_run, other)) == {B.key: WIPE_GRACE}
    assert until(since(last_run, seen(50, A))) == {}


def test_what_was_held_at_the_start_goes_as_every_hold_does() -> None:
    peers = [peer(number) for number in range(1, 11)]
    moved = peer(2, key="10.5.77.0-24", at=7)
    first = seen(6, moved)
    gone = since(seen(5, *peers), first)
    assert set(gone.kept) == keys(peers) - {B.key}
    later = left(gone, first, seen(7, moved, A), NOW + 1)
    assert set(later.kept) == keys(peers) - {A.key, B.key}
    assert until(left(later, first, first, NOW + WIPE_GRACE)) == {}


# --- properties -----------------------------------------------------------------------------------

numbers = st.sets(st.integers(1, 12), max_size=12)
steps = st.lists(st.tuples(numbers, st.floats(0, 12)), min_size=1, max_size=8)


@given(first=numbers, steps=steps, grace=st.sampled_from([0.0, 5.0, 60.0]))
def test_nobody_stays_who_is_there_and_nobody_stays_for_ever(
    first: set[int], steps: list[tuple[set[int], float]], grace: float
) -> None:
    departed, last, now = NOBODY, seen(1, *map(peer, first)), NOW
    for revision, (present, seconds) in enumerate(steps, start=2):
        now += seconds
        fresh = seen(revision, *map(peer, present))
        departed = left(departed, last, fresh, now, grace)
        assert not departed.kept.keys() & fresh.records.keys()
        assert departed.kept.keys() >= last.records.keys() - fresh.records.keys()
        assert all(now < gone.until <= now + max(grace, RECLAIM_SECONDS) for gone in departed.kept.values())
        last = fresh
    assert until(left(departed, last, last, now + max(grace, RECLAIM_SECONDS), grace)) == {}
