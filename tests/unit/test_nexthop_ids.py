"""Ids of nexthop objects: given once, kept, given up."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from flanneld_py.drivers.nexthopids import NexthopIds
from flanneld_py.model import NextHop


def hop(number: int) -> NextHop:
    return NextHop("flannel.1", IPv4Address(number), onlink=True)


def test_an_id_is_given_once_and_kept() -> None:
    ids = NexthopIds(range(10, 13))
    assert [ids.give(hop(1)), ids.give(hop(2)), ids.give(hop(1))] == [(10, True), (11, True), (10, False)]
    assert ids.known == {10, 11}
    assert ids.of == {hop(1): [10], hop(2): [11]}


def test_ids_in_use_are_passed_over_whosever_they_are() -> None:
    ids = NexthopIds(range(10, 13))
    ids.seen({10, 11}, {11: hop(1)})
    assert ids.known == {11}
    assert ids.give(hop(1)) == (11, False)
    assert ids.give(hop(2)) == (12, True)


def test_of_a_nexthop_with_several_ids_the_first_is_used_and_all_are_forgotten() -> None:
    ids = NexthopIds(range(10, 14))
    ids.seen({10, 11, 12}, {11: hop(1), 12: hop(1)})
    assert ids.give(hop(1)) == (11, False)
    ids.forget([hop(1), hop(2)])
    assert (ids.known, ids.of) == (set(), {})
    assert ids.give(hop(1)) == (13, True)


def test_without_room_nothing_is_given_and_nothing_taken_for_given() -> None:
    ids = NexthopIds(range(10, 12))
    assert ids.is_room(2)
    assert not ids.is_room(3)
    ids.give(hop(1))
    ids.give(hop(2))
    assert not ids.is_room(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="all 2 nexthop ids of this etcd prefix are in use"):
            ids.give(hop(3))
    assert not ids.of.get(hop(3))
    assert ids.give(hop(2)) == (11, False)
