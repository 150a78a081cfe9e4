"""Which peers stay although their record has left the registry, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from flanneld_py.core.admit import admit
from flanneld_py.core.linger import RECLAIM_SECONDS, RETURN_SECONDS, WIPE_SECONDS, Departed, departures
from flanneld_py.model import PerFamily, Record, Snapshot
from tests.unit import strategies
from tests.unit.strategies import host, mac, subnet, underlay

NOW = 1000.0


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


def seen(revision: int, *records: Record, epoch: int = 0) -> Snapshot:
    return Snapshot(revision, 7, {record.key: record for record in records}, epoch=epoch)


def until(departed: Mapping[str, Departed]) -> dict[str, float]:
    """Key → for how long, from NOW."""
    return {key: gone.until - NOW for key, gone in departed.items()}


A, B, C = peer(1), peer(2), peer(3)


def test_a_deleted_peer_stays_for_a_moment() -> None:
    gone = departures({}, seen(5, A, B), seen(6, A), NOW)
    assert gone[B.key].record == B
    assert until(gone) == {B.key: RECLAIM_SECONDS}
    unchanged = seen(6, A)
    assert departures(gone, unchanged, unchanged, NOW + RECLAIM_SECONDS - 0.1) == gone
    assert departures(gone, unchanged, unchanged, NOW + RECLAIM_SECONDS) == {}


def test_time_does_not_begin_anew_with_every_snapshot() -> None:
    gone = departures({}, seen(5, A, B), seen(6, A), NOW)
    assert departures(gone, seen(6, A), seen(7, A, C), NOW + 1) == gone


def test_whoever_is_back_is_not_gone() -> None:
    gone = departures({}, seen(5, A, B), seen(6, A), NOW)
    assert departures(gone, seen(6, A), seen(7, A, replace(B, create_revision=7)), NOW + 0.1) == {}
    assert departures(gone, seen(6, A), seen(7, A, replace(C, key=B.key)), NOW + 0.1) == {}


def test_peers_stay_longer_when_etcd_lost_its_data() -> None:
    others = [peer(number) for number in range(4, 9)]
    many = departures({}, seen(50, A, *others), seen(60, A, epoch=1), NOW)
    one_more = departures(many, seen(60, A, epoch=1), seen(61, epoch=1), NOW)
    assert until(one_more) == dict.fromkeys((o.key for o in others), RETURN_SECONDS) | {
        A.key: RECLAIM_SECONDS
    }
    gone = departures({}, seen(50, A, B), seen(60, epoch=1), NOW)
    assert until(gone) == {A.key: RETURN_SECONDS, B.key: RETURN_SECONDS}
    back = departures(gone, seen(60, epoch=1), seen(61, A, epoch=1), NOW + 5)
    assert back == {B.key: gone[B.key]}
    # What is deleted from the new etcd is deleted.
    later = departures(back, seen(61, A, epoch=1), seen(62, epoch=1), NOW + 6)
    assert until(later) == {A.key: 6 + RECLAIM_SECONDS, B.key: RETURN_SECONDS}


@pytest.mark.parametrize(
    ("known", "gone", "kept_for"),
    [
        (4, 3, RECLAIM_SECONDS),
        (4, 4, WIPE_SECONDS),
        (20, 4, RECLAIM_SECONDS),
        (20, 5, WIPE_SECONDS),
        (100, 20, RECLAIM_SECONDS),
        (100, 21, WIPE_SECONDS),
    ],
)
def test_many_peers_deleted_together_stay_longer(known: int, gone: int, kept_for: float) -> None:
    peers = [peer(number) for number in range(1, known + 1)]
    departed = departures({}, seen(5, *peers), seen(6, *peers[gone:]), NOW)
    assert until(departed) == dict.fromkeys((record.key for record in peers[:gone]), kept_for)


def delete_one_by_one(count: int, every: float) -> dict[str, Departed]:
    """What is kept after the last of `count` deletions among ten peers, the first of them at NOW."""
    peers = [peer(number) for number in range(1, 11)]
    departed: dict[str, Departed] = {}
    for number in range(count):
        last, fresh = (seen(10 + n, *peers[n:]) for n in (number, number + 1))
        departed = departures(departed, last, fresh, NOW + number * every)
    return departed


def test_many_peers_deleted_one_after_the_other_stay_longer() -> None:
    assert until(delete_one_by_one(3, 0.5))[peer(3).key] == 1 + RECLAIM_SECONDS
    assert set(until(delete_one_by_one(4, 0.5)).values()) == {1.5 + WIPE_SECONDS}
    many = delete_one_by_one(10, 0.5)
    assert many.keys() == {peer(number).key for number in range(1, 11)}
    assert min(until(many).values()) >= WIPE_SECONDS


def test_peers_deleted_now_and_then_do_not_add_up() -> None:
    assert until(delete_one_by_one(10, 2.5)) == {peer(10).key: 9 * 2.5 + RECLAIM_SECONDS}
    # Long after a wipe of which some are still kept, a single deletion is one.
    peers = [peer(number) for number in range(1, 11)]
    wiped = departures({}, seen(5, *peers), seen(6, *peers[5:]), NOW)
    later = departures(wiped, seen(6, *peers[5:]), seen(7, *peers[6:]), NOW + 30)
    assert until(later) == until(wiped) | {peer(6).key: 30 + RECLAIM_SECONDS}


def test_a_claim_ends_the_stay_after_a_wipe() -> None:
    peers = [peer(number) for number in range(1, 11)]
    wiped = departures({}, seen(5, *peers), seen(6), NOW)
    back = replace(peers[0], create_revision=7)
    taken = replace(peer(77), key=peers[1].key)
    left = departures(wiped, seen(6), seen(8, back, taken), NOW + 1)
    assert left == {record.key: wiped[record.key] for record in peers[2:]}


def test_nothing_is_gone_at_the_start_or_when_nothing_happened() -> None:
    first = seen(5, A)
    assert departures({}, None, first, NOW) == {}
    assert departures({}, first, first, NOW) == {}


def test_the_departed_never_stand_in_the_way_of_the_living() -> None:
    own = peer(9)
    moved = replace(B, key="10.5.4.0-24", subnets=PerFamily(subnet(4, 4)), create_revision=90)
    taken_over = replace(peer(5, key="10.5.3.0-24", at=91), subnets=PerFamily(subnet(4, 3)))
    ours_before = replace(own, key="10.5.8.0-24", subnets=PerFamily(subnet(4, 8)))
    peers = admit(
        seen(91, own, moved, taken_over),
        own,
        strategies.config("vxlan", (4,)),
        host(9),
        "vxlan",
        departed=[A, B, C, ours_before],
    )
    assert peers.accepted == (moved, taken_over, A)
    assert peers.rejected == {}
