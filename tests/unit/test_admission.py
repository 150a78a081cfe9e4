"""Who is admitted after each of several changes is who is admitted when all are judged anew."""

from __future__ import annotations

import time
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.admission import Admission
from flanneld_py.core.admit import admit
from flanneld_py.model import Record
from tests.unit.strategies import snapshot_of, subnet, thorough
from tests.unit.test_admit import OWN, World, clash, peer, worlds


@thorough
@given(worlds(), st.lists(worlds(), max_size=4), st.data())
def test_the_same_as_judged_anew(first: World, later: list[World], data: st.DataObject) -> None:
    """Worlds share records and context with those before, or not."""
    admission = Admission()
    known: dict[str, Record] = {}
    context = first
    accepted: dict[str, Record] = {}
    for world in [first, *later]:
        if data.draw(st.integers(0, 4)) == 0:
            context = world
        kept = {key: record for key, record in known.items() if data.draw(st.booleans())}
        fresh = {record.key: record for record in world.records}
        known = {**fresh, **kept} if data.draw(st.booleans()) else {**kept, **fresh}
        departed = tuple(r for r in world.departed if data.draw(st.booleans()))
        snapshot = snapshot_of(tuple(known.values()))
        wanted = admit(snapshot, context.own, context.config, context.here, "vxlan", departed)
        found = admission.admit(snapshot, context.own, context.config, context.here, "vxlan", departed)
        assert found.peers.accepted == wanted.accepted
        assert dict(found.peers.rejected) == dict(wanted.rejected)
        assert dict(found.peers.doubtful) == dict(wanted.doubtful)
        if not found.afresh:
            for record in found.removed:
                assert accepted.pop(record.key) is record
            accepted |= {record.key: record for record in found.added}
            assert accepted == {record.key: record for record in wanted.accepted}
        accepted = {record.key: record for record in wanted.accepted}


def told(admission: Admission, *records: Record, **more: Any) -> tuple[list[str], list[str], bool]:
    world = World(tuple(records))
    found = admission.admit(
        snapshot_of(world.records), OWN, CONTEXT.config, CONTEXT.here, "vxlan", more.get("departed", ())
    )
    return [r.key for r in found.added], [r.key for r in found.removed], found.afresh


CONTEXT = World(())


def test_one_that_joins_is_all_that_changes() -> None:
    admission, old = Admission(), [peer(number) for number in range(2, 6)]
    assert told(admission, *old)[2]
    assert told(admission, *old, peer(7)) == (["peer-7"], [], False)


def test_one_that_leaves_is_all_that_changes() -> None:
    admission, old = Admission(), [peer(number) for number in range(2, 6)]
    told(admission, *old)
    assert told(admission, *old[1:]) == ([], ["peer-2"], False)
    assert told(admission, *old[1:]) == ([], [], False)


def test_one_that_stays_for_a_moment_has_not_left() -> None:
    admission, old = Admission(), [peer(number) for number in range(2, 6)]
    told(admission, *old)
    assert told(admission, *old[1:], departed=(old[0],)) == ([], [], False)
    assert told(admission, *old[1:]) == ([], ["peer-2"], False)


@pytest.mark.parametrize(
    "change",
    [
        {"subnets": PerFamily(subnet(4, 2))},
        {"subnets": PerFamily(ip_network("10.5.2.64/26"))},
        {"subnets": PerFamily(ip_network("10.5.4.0/22"))},
        {"vtep_macs": peer(2).vtep_macs},
    ],
    ids=str,
)
def test_what_meets_an_older_one_waits_until_it_has_left(change: dict[str, Any]) -> None:
    admission, old = Admission(), [peer(number) for number in range(2, 6)]
    told(admission, *old)
    meeting = replace(peer(7), **change)
    assert told(admission, *old, meeting) == ([], [], False)
    others = [record for record in old if not clash(record, meeting)]
    assert told(admission, *others, meeting)[:1] == (["peer-7"],)
    older = replace(meeting, create_revision=1, mod_revision=1)
    assert told(admission, *others, older) == (["peer-7"], ["peer-7"], False)
    assert told(admission, *old, older) == ([], [], False), "who comes back is the younger one"


def test_who_shares_an_address_has_rows_in_common() -> None:
    admission, old = Admission(), [peer(number) for number in range(2, 6)]
    told(admission, *old)
    assert told(admission, *old, replace(peer(7), public_ips=peer(2).public_ips)) == (["peer-7"], [], True)
    assert told(admission, *old) == ([], ["peer-7"], True)
    assert told(admission, *old, peer(8)) == (["peer-8"], [], False)


LARGE = [
    peer(1, key="large", subnets=PerFamily(ip_network("10.5.64.0/18")), create_revision=revision)
    for revision in (1, 10**6)
]


@pytest.mark.parametrize("large", LARGE, ids=["older than all in it", "younger than all in it"])
def test_the_effort_of_a_large_subnet_among_many_is_linear(large: Record) -> None:
    """Quadratic work would take 64 times as long for 8 times the records."""
    base = int(ip_address("10.5.64.0"))

    def seconds(count: int) -> float:
        small = [
            replace(peer(n % 200 + 2), key=f"peer-{n}", subnets=PerFamily(ip_network((base + n, 32))))
            for n in range(count)
        ]
        admission, start = Admission(), time.process_time()
        told(admission, *small, large)
        return time.process_time() - start

    assert min(seconds(8_000) for _ in range(3)) < 32 * min(seconds(1_000) for _ in range(5))
