"""Which peers stay although their record has left the registry, and for how long."""

from __future__ import annotations

from dataclasses import replace

from flanneld_py.core.admit import admit
from flanneld_py.core.linger import RECLAIM_SECONDS, RETURN_SECONDS, Departed, departures
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


def seen(revision: int, *records: Record, cluster: int = 7) -> Snapshot:
    return Snapshot(revision, cluster, {record.key: record for record in records})


A, B, C = peer(1), peer(2), peer(3)


def test_a_deleted_peer_stays_for_a_moment() -> None:
    gone = departures({}, seen(5, A, B), seen(6, A), NOW)
    assert gone == {B.key: Departed(B, NOW + RECLAIM_SECONDS)}
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
    expected = {record.key: Departed(record, NOW + RETURN_SECONDS) for record in (A, B)}
    assert departures({}, seen(50, A, B), seen(1), NOW) == expected
    assert departures({}, seen(50, A, B), seen(50, cluster=8), NOW) == expected
    back = departures(expected, seen(1), seen(2, A), NOW + 5)
    assert back == {B.key: expected[B.key]}
    # What is deleted from the new etcd is deleted.
    assert departures(back, seen(2, A), seen(3), NOW + 6)[A.key].until == NOW + 6 + RECLAIM_SECONDS


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
