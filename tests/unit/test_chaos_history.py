"""The checks of the history of etcd: each passes one that is right, and finds what it is for."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.chaos.history import Event
from tests.chaos.registry_checks import check_idempotence, check_ownership, check_stability, check_watch

if TYPE_CHECKING:
    from tests.chaos.recording import Recording

A, B = "subnets/10.5.101.0-24", "subnets/10.5.102.0-24"


def put(revision: int, key: str, owner: str, *, lease: int = 1, address: str = "192.0.2.1") -> Event:
    value = json.dumps({"PublicIP": address, "PublicIPv6": None, "NodeID": owner})
    return Event(float(revision), revision, key, value, lease)


def delete(revision: int, key: str) -> Event:
    return Event(float(revision), revision, key, None, 0)


def run(*events: Event, mirror: str = "", gaps: tuple[int, ...] = ()) -> Recording:
    made: Any = SimpleNamespace(
        events=events,
        history_gaps=gaps,
        hosts={"alpha": "a", "beta": "b"},
        began=0.0,
        settled=100.0,
        stopped=200.0,
        routes_gone=[],
        mirror=mirror,
        time=lambda at: f"{at:.1f} s",
    )
    return cast("Recording", made)


WELL = (put(2, A, "a"), put(3, B, "b"), delete(4, A), put(5, A, "a"), put(6, A, "a", address="192.0.2.9"))


def test_a_right_history_passes() -> None:
    for check in (check_ownership, check_stability, check_idempotence):
        assert list(check(run(*WELL))) == []


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ((put(2, A, "a"), put(3, A, "b")), "went from a to b at once"),
        ((put(2, A, "a"), put(3, "subnets/10.5.101.128-25", "b")), "overlaps"),
        ((put(2, f"{A}&fd00:5::-64", "a"), put(3, f"{B}&fd00:5::-64", "b")), "overlaps"),
    ],
)
def test_two_owners_at_once_are_found(events: tuple[Event, ...], said: str) -> None:
    (line,) = check_ownership(run(*events))
    assert said in line


def test_who_gives_way_at_once_is_no_second_owner() -> None:
    partly = "subnets/10.5.101.0-24&fd00:5::-64"
    events = (put(2, A, "a"), put(3, partly, "b"), delete(4, partly), put(5, B, "b"))
    assert list(check_ownership(run(*events))) == []
    assert len(list(check_ownership(run(*events[:2], delete(40, partly))))) == 1


def test_a_new_owner_after_a_delete_is_right() -> None:
    assert list(check_ownership(run(put(2, A, "a"), delete(3, A), put(4, A, "b")))) == []


def test_a_gap_in_the_history_is_named() -> None:
    assert list(check_ownership(run(gaps=(7,)))) == ["the history is not known at revisions 7"]


def test_a_host_that_moves_is_found() -> None:
    (line,) = check_stability(run(put(2, A, "a"), delete(3, A), put(4, B, "a")))
    assert line.startswith("alpha had")


def test_what_is_written_for_nothing_is_found() -> None:
    (line,) = check_idempotence(run(put(2, A, "a"), put(3, A, "a")))
    assert "written again" in line
    (line,) = check_idempotence(run(put(2, A, "a"), put(150, A, "a", address="192.0.2.7")))
    assert "when all was well" in line


def mirrored(*items: tuple[str, int, list[Event]]) -> str:
    return "".join(
        json.dumps({"kind": kind, "revision": at, "keys": [[e.key, e.value] for e in events]}) + "\n"
        for kind, at, events in items
    )


ONE, TWO, GONE, AGAIN, MOVED = WELL


@pytest.mark.parametrize(
    ("items", "wrong"),
    [
        ([("listing", 3, [ONE, TWO]), ("changes", 4, [GONE]), ("changes", 6, [AGAIN, MOVED])], ""),
        ([("listing", 3, [ONE, TWO]), ("changes", 6, [GONE, AGAIN, MOVED])], ""),
        ([("listing", 3, [ONE, TWO]), ("listing", 6, [TWO, MOVED])], ""),
        ([("listing", 3, [ONE, TWO]), ("changes", 5, [AGAIN]), ("changes", 6, [MOVED])], "delivered"),
        ([("listing", 3, [ONE, TWO]), ("changes", 6, [AGAIN, GONE, MOVED])], "out of order"),
        (
            [("listing", 3, [ONE, TWO]), ("changes", 4, [GONE, GONE]), ("changes", 6, [AGAIN, MOVED])],
            "delivered",
        ),
        ([("listing", 3, [ONE]), ("changes", 6, [GONE, AGAIN, MOVED])], "listing"),
        ([("listing", 3, [ONE, TWO]), ("changes", 4, [GONE])], "came to revision 4 only"),
    ],
)
def test_the_contract_of_a_watch(items: list[tuple[str, int, list[Event]]], wrong: str) -> None:
    found = list(check_watch(run(*WELL, mirror=mirrored(*items))))
    assert bool(found) == bool(wrong)
    assert wrong in "".join(found[:1])
