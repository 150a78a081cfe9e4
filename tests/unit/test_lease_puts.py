"""When our record is written again for Go flannel: the schedule over a daemon's life and the next one's."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.leasepolicy import LeasePolicy
from flanneld_py.daemon import leaseputs
from flanneld_py.daemon.leaseputs import PutSchedule
from flanneld_py.model import OwnLease, Record, Snapshot
from tests.unit.leasing import record
from tests.unit.strategies import mac, snapshot_of

DAY = 86_400
OWN = OwnLease(record(3, 1, mod_revision=50), DAY)
GO = record(4, 2, node_id="")
BOOTED = 1_000_000.0
"""When the clock that counts from boot began, on the wall."""


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leaseputs, "boottime", lambda: clock.now)
    monkeypatch.setattr("time.time", lambda: BOOTED + clock.now)
    return clock


def seen(*others: Record, unreadable: int = 0) -> Snapshot:
    return replace(snapshot_of([OWN.record, *others]), unreadable=unreadable)


def schedule(due: float = 0.0) -> PutSchedule:
    return PutSchedule(LeasePolicy(), Random(1), due)


def in_time(at: float | None, since: float) -> bool:
    return at is not None and 0.9 * (DAY - 3600) <= at - since <= 1.1 * (DAY - 3600)


def test_nothing_without_a_go_host_and_in_time_with_one(clock: Clock) -> None:
    puts = schedule()
    puts.look(seen(unreadable=90), OWN)
    assert (puts.at, puts.due) == (None, 0.0)
    clock.now = 5000.0
    puts.look(seen(GO), OWN)
    assert in_time(puts.at, 5000.0)
    assert puts.at is not None
    assert puts.due == pytest.approx(BOOTED + puts.at, abs=1)
    first = puts.at
    clock.now = 6000.0
    puts.look(seen(GO, record(5, 3)), OWN)
    assert puts.at == first, "others that come and go change nothing"
    puts.look(seen(), OWN)
    assert puts.at is None
    assert puts.due == 0


def test_each_put_begins_the_time_anew(clock: Clock) -> None:
    puts = schedule()
    puts.look(seen(GO), OWN)
    clock.now = puts.at or 0.0
    puts.written(OWN)
    assert in_time(puts.at, clock.now)


def test_once_after_something_unreadable_and_at_most_once_in_ten_minutes(clock: Clock) -> None:
    puts = schedule()
    puts.look(seen(GO), OWN)
    clock.now = 2000.0
    puts.look(seen(GO, unreadable=60), OWN)
    assert puts.at is not None
    assert 2005 <= puts.at <= 2030
    at = puts.at
    clock.now = 2003.0
    puts.look(seen(GO, unreadable=61), OWN)
    assert puts.at == at, "counted from the first"
    clock.now = at
    puts.written(OWN)
    newer = OwnLease(replace(OWN.record, mod_revision=70), DAY)
    puts.look(seen(GO, unreadable=61), newer)
    assert in_time(puts.at, at), "made up for"
    puts.look(seen(GO, unreadable=80), newer)
    assert puts.at == at + 600


def test_what_was_unreadable_before_our_last_write_is_no_reason_at_a_start(clock: Clock) -> None:
    puts = schedule()
    puts.look(seen(GO, unreadable=49), OWN)
    assert in_time(puts.at, clock.now)
    puts = schedule()
    puts.look(seen(GO, unreadable=51), OWN)
    assert puts.at is not None
    assert puts.at <= clock.now + 30


def test_a_restart_does_not_put_it_off(clock: Clock) -> None:
    puts = schedule(BOOTED + clock.now + 100)
    puts.look(seen(GO), OWN)
    assert puts.at == pytest.approx(clock.now + 100)
    assert puts.due == pytest.approx(BOOTED + clock.now + 100, abs=1)


@pytest.mark.parametrize("due", [1.0, BOOTED])
def test_what_is_overdue_is_made_up_for_within_half_a_minute(clock: Clock, due: float) -> None:
    puts = schedule(due)
    puts.look(seen(GO), OWN)
    assert puts.at is not None
    assert 5 <= puts.at - clock.now <= 30


def test_a_clock_on_the_wall_that_was_wrong_puts_it_off_by_no_more_than_a_period(clock: Clock) -> None:
    puts = schedule(BOOTED + 1e9)
    puts.look(seen(GO), OWN)
    assert in_time(puts.at, clock.now)


def test_no_put_while_somebody_has_our_mac(clock: Clock) -> None:
    own = OwnLease(replace(OWN.record, vtep_macs=PerFamily(mac(9))), DAY)
    thief = replace(GO, vtep_macs=PerFamily(mac(9)))
    puts = schedule()
    puts.look(seen(thief, unreadable=90), own)
    assert puts.at is None
    clock.now += 10
    puts.look(seen(GO, unreadable=90), own)
    assert puts.at is not None
