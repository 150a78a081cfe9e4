"""The mailbox between the threads: latest values, no lost wake-up, and an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from msgspec.structs import replace

from flanneld_py.daemon.heartbeats import BEAT_EVERY
from flanneld_py.daemon.inbox import (
    FIRST_PASS,
    Inbox,
    LeaseState,
    Levels,
    Problem,
    RegistryState,
    Report,
    boottime,
)
from flanneld_py.model import Snapshot

PATIENCE = 10.0
"""Seconds after which a thread that should have ended is given up; never waited out when all is well."""


@contextmanager
def in_a_thread(body: Callable[[], None]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_first_wait_does_not_block() -> None:
    assert Inbox().wait(-1) == (0, Levels())


def test_offers_replace_only_what_they_name() -> None:
    inbox = Inbox()
    inbox.offer(report=Report(passes=1))
    inbox.offer(snapshot=Snapshot(7, 1), host_problem=Problem("a", "b", "c"))
    assert inbox.levels == replace(
        Levels(), report=Report(passes=1), snapshot=Snapshot(7, 1), host_problem=Problem("a", "b", "c")
    )
    with pytest.raises(TypeError):
        inbox.offer(nothing_of_the_kind=1)


def test_levels_cannot_be_changed_behind_the_back() -> None:
    with pytest.raises(AttributeError):
        Inbox().levels.kernel_changes = 1  # type: ignore[misc]


def test_many_offers_are_one_wake_up_with_the_latest() -> None:
    inbox = Inbox()
    for revision in range(1, 10_001):
        inbox.offer(snapshot=Snapshot(revision, 1))
    seen, levels = inbox.wait(-1)
    assert levels.snapshot == Snapshot(10_000, 1)
    now = boottime()
    assert inbox.wait(seen, until=now) == (seen, levels)


def test_what_was_offered_since_is_not_missed() -> None:
    inbox = Inbox()
    seen, _ = inbox.wait(-1)
    inbox.offer(report=Report(passes=5))
    again, levels = inbox.wait(seen)
    assert again != seen
    assert levels.report.passes == 5


def test_wait_ends_at_its_time() -> None:
    inbox = Inbox()
    seen, _ = inbox.wait(-1)
    end = boottime() + 0.05
    assert inbox.wait(seen, until=end) == (seen, Levels())
    assert end <= boottime() < end + PATIENCE


def test_wait_until_the_past_does_not_block() -> None:
    inbox = Inbox()
    seen, _ = inbox.wait(-1)
    assert inbox.wait(seen, until=0.0) == (seen, Levels())


@pytest.mark.parametrize(
    "event",
    [
        lambda inbox: inbox.offer(report=Report(passes=1)),
        lambda inbox: inbox.kernel_changed(),
        lambda inbox: inbox.poke(),
        lambda inbox: inbox.stop(),
    ],
    ids=["offer", "kernel_changed", "poke", "stop"],
)
def test_every_event_wakes_all_who_wait(event: Callable[[Inbox], None]) -> None:
    inbox, woken, ready = Inbox(), [], threading.Barrier(3)
    seen, _ = inbox.wait(-1)

    def reader() -> None:
        ready.wait(PATIENCE)
        woken.append(inbox.wait(seen))

    with in_a_thread(reader), in_a_thread(reader):
        ready.wait(PATIENCE)
        event(inbox)
    assert len(woken) == 2
    assert all(version != seen for version, _ in woken)


def test_who_is_first_has_a_snapshot_before_all_others() -> None:
    inbox = Inbox()
    woken: list[str] = []
    waiting, busy = threading.Event(), threading.Event()
    seen, _ = inbox.wait(-1)

    def first() -> None:
        waiting.set()
        version, _ = inbox.wait(seen, first=True)
        busy.wait(PATIENCE)
        woken.append("first")
        inbox.wait(version, until=boottime() + PATIENCE, first=True)

    def other() -> None:
        inbox.wait(seen)
        woken.append("other")
        inbox.stop()

    with in_a_thread(first), in_a_thread(other):
        assert waiting.wait(PATIENCE)
        while not inbox._first_waits:
            time.sleep(0.001)
        inbox.offer(snapshot=Snapshot(7, 1))
        busy.set()
    assert woken == ["first", "other"]


def test_a_snapshot_wakes_all_while_the_first_is_busy() -> None:
    inbox = Inbox()
    seen, _ = inbox.wait(-1, first=True)
    woken: list[int] = []
    ready = threading.Event()

    def other() -> None:
        ready.set()
        begun = boottime()
        inbox.wait(seen)
        woken.append(boottime() - begun < BEAT_EVERY / 2)

    with in_a_thread(other):
        assert ready.wait(PATIENCE)
        inbox.offer(snapshot=Snapshot(7, 1))
    assert woken == [True]


def test_a_poke_brings_no_new_value() -> None:
    inbox = Inbox()
    inbox.offer(report=Report(passes=1))
    before = inbox.levels
    inbox.poke()
    assert inbox.levels is before


def test_no_offer_is_lost_between_threads() -> None:
    inbox = Inbox()

    def count() -> None:
        for _ in range(500):
            inbox.kernel_changed()

    with in_a_thread(count), in_a_thread(count), in_a_thread(count):
        pass
    assert inbox.levels.kernel_changes == 1500


def test_a_reader_sees_a_change_of_two_levels_at_once() -> None:
    inbox, torn = Inbox(), []

    def write() -> None:
        for number in range(1, 501):
            inbox.offer(kernel_changes=number, report=Report(passes=number))
        inbox.stop()

    def read() -> None:
        seen = -1
        while not inbox.stopped:
            seen, levels = inbox.wait(seen)
            if levels.kernel_changes != levels.report.passes:
                torn.append(levels)

    with in_a_thread(read), in_a_thread(write):
        pass
    assert torn == []


# --- the end --------------------------------------------------------------------------------------


def test_after_stop_nobody_waits_any_more() -> None:
    inbox = Inbox()
    assert not inbox.stopped
    inbox.stop()
    assert inbox.stopped
    seen, _ = inbox.wait(-1)
    assert inbox.wait(seen) == (seen, Levels())
    inbox.pause(PATIENCE * 10)


def test_stop_ends_a_pause() -> None:
    inbox, begun = Inbox(), threading.Event()

    def sleep() -> None:
        begun.set()
        inbox.pause(PATIENCE * 10)

    with in_a_thread(sleep):
        assert begun.wait(PATIENCE)
        inbox.stop()


def test_news_do_not_shorten_a_pause() -> None:
    inbox, begun = Inbox(), threading.Event()
    times: list[float] = []

    def sleep() -> None:
        times.append(boottime())
        begun.set()
        inbox.pause(0.1)
        times.append(boottime())

    with in_a_thread(sleep):
        assert begun.wait(PATIENCE)
        for _ in range(50):
            inbox.kernel_changed()
    assert times[1] - times[0] >= 0.1


# --- values ---------------------------------------------------------------------------------------


def test_the_time_of_a_problem_is_no_part_of_it() -> None:
    assert Problem("a", "b", "c", "2026-01-01T00:00:00Z") == Problem("a", "b", "c", "2026-01-02T00:00:00Z")
    assert Problem("a", "b", "c") != Problem("a", "other", "c")
    assert RegistryState("in sync", since="1") == RegistryState("in sync", since="2")
    assert LeaseState("held") != LeaseState("lost")


def test_others_wait_for_the_first_pass_from_the_moment_that_the_lease_is_held() -> None:
    inbox = Inbox()
    inbox.let_set_up()
    inbox.offer(lease=LeaseState("held"))
    over = []

    def wait() -> None:
        inbox.let_set_up()
        over.append(inbox.levels.report.passes)

    with in_a_thread(wait):
        inbox.offer(snapshot=Snapshot(7, 1))
        inbox.offer(report=Report(passes=1))
    assert over == [1]


def test_a_stop_does_not_wait_for_the_first_pass() -> None:
    inbox = Inbox()
    inbox.offer(lease=LeaseState("held"))
    began = boottime()
    with in_a_thread(inbox.let_set_up):
        inbox.stop()
    assert boottime() - began < FIRST_PASS


def test_a_first_pass_that_never_ends_holds_nobody_up_again() -> None:
    inbox = Inbox()
    inbox.offer(lease=LeaseState("held"))
    began = boottime()
    inbox.let_set_up()
    assert boottime() - began >= FIRST_PASS
    for _ in range(100):
        inbox.let_set_up()
    assert boottime() - began < 2 * FIRST_PASS
