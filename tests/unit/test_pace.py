"""Retrying, limiting and backing off, with time as a number."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core.pace import Backoff, RetrySchedule, TokenBucket, probe_seconds
from tests.unit.strategies import usual


def waits(schedule: RetrySchedule, failures: int) -> list[float]:
    """Seconds from each of so many failures in a row to the next attempt."""
    now, found = 1000.0, []
    for _ in range(failures):
        schedule.failed("op", now)
        due = schedule.next_due()
        assert due is not None
        found.append(due - now)
        now = due
    return found


def test_retry_after_1_2_4_to_60_seconds() -> None:
    assert waits(RetrySchedule(), 9) == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_what_fails_for_days_is_still_retried_every_minute() -> None:
    assert waits(RetrySchedule(), 5000)[-1] == 60


def test_due_exactly_when_the_time_has_come() -> None:
    schedule = RetrySchedule()
    assert schedule.due("op", 0.0)
    assert schedule.next_due() is None
    schedule.failed("op", 10.0)
    assert not schedule.due("op", 10.999)
    assert schedule.due("op", 11.0)
    assert schedule.due("other", 10.0)
    assert schedule.next_due() == 11.0


def test_success_forgets_the_failures() -> None:
    schedule = RetrySchedule()
    waits(schedule, 5)
    schedule.succeeded("op")
    assert schedule.next_due() is None
    assert waits(schedule, 1) == [1]
    schedule.succeeded("never failed")


def test_start_over_means_the_first_delay_again_from_the_last_attempt() -> None:
    schedule = RetrySchedule()
    for now in (0.0, 1.0, 3.0, 7.0):
        schedule.failed("op", now)
    assert schedule.next_due() == 15.0
    schedule.start_over()
    assert schedule.next_due() == 8.0
    schedule.failed("op", 8.0)
    assert schedule.next_due() == 10.0


def test_start_over_makes_nothing_wait_longer() -> None:
    schedule = RetrySchedule()
    schedule.failed("one", 100.0)
    schedule.start_over()
    assert schedule.next_due() == 101.0
    schedule.start_over()
    assert schedule.next_due() == 101.0
    empty = RetrySchedule()
    empty.start_over()
    assert empty.next_due() is None


@usual
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50)), max_size=20),
    st.sets(st.sampled_from("abcd")),
)
def test_keep_only_forgets_the_others_and_nothing_else(
    failures: list[tuple[str, int]], wanted: set[str]
) -> None:
    schedule, pruned = RetrySchedule(), RetrySchedule()
    for key, now in failures:
        schedule.failed(key, now)
        pruned.failed(key, now)
    pruned.keep_only(iter(wanted))
    for key in "abcd":
        for now in range(0, 200, 3):
            assert pruned.due(key, now) == (key not in wanted or schedule.due(key, now))
    due = [pruned.next_due()]
    if due != [None]:
        assert wanted & {key for key, _ in failures}


# --- token bucket ---------------------------------------------------------------------------------


@usual
@given(
    st.integers(1, 20),
    st.floats(0.5, 20),
    st.lists(st.one_of(st.just(0.0), st.floats(0, 5)), min_size=1, max_size=80),
)
def test_never_more_than_the_burst_and_the_rate_in_any_span(
    burst: int, per_second: float, pauses: list[float]
) -> None:
    now, taken = 0.0, []
    bucket = TokenBucket(burst, per_second, now)
    for pause in pauses:
        now += pause
        now += bucket.take(now)
        taken.append(now)
    for first, begin in enumerate(taken):
        for count, end in enumerate(taken[first:], start=1):
            assert count <= burst + (end - begin) * per_second + 1 + 1e-6


def test_the_first_of_a_burst_at_once_then_one_per_interval() -> None:
    bucket = TokenBucket(3, 5.0, 100.0)
    now, found = 100.0, []
    for _ in range(6):
        wait = bucket.take(now)
        now += wait
        found.append(round(wait, 6))
    assert found == [0, 0, 0, 0.2, 0.2, 0.2]


def test_the_bucket_fills_up_to_the_burst_and_no_further() -> None:
    bucket = TokenBucket(3, 5.0, 0.0)
    assert [bucket.take(1e6) for _ in range(4)] == pytest.approx([0, 0, 0, 0.2])


# --- back-off -------------------------------------------------------------------------------------


@usual
@given(st.floats(0.1, 600), st.floats(0, 1, exclude_max=True), st.integers(1, 60))
def test_delays_double_up_to_the_longest_within_the_jitter(
    longest: float, random: float, attempts: int
) -> None:
    backoff = Backoff(longest)
    for attempt in range(attempts):
        middle = min(0.1 * 2**attempt, longest)
        delay = backoff.delay(random)
        assert 0.5 * middle <= delay <= 1.5 * middle
    backoff.reset()
    assert backoff.delay(0.5) == pytest.approx(0.1)


def test_jitter_spreads_over_its_whole_span() -> None:
    delays = [Backoff(10.0).delay(random / 100) for random in range(100)]
    assert delays[0] == pytest.approx(0.05)
    assert delays[-1] == pytest.approx(0.149)
    assert all(one < other for one, other in pairwise(delays))


def test_thousands_of_failures_do_not_overflow() -> None:
    backoff = Backoff(2.0)
    assert {backoff.delay(0.5) for _ in range(3000)} >= {2.0}


def test_what_waits_for_another_is_due_with_it_and_has_not_failed() -> None:
    schedule = RetrySchedule()
    schedule.failed("route", 10.0)
    schedule.failed("nexthop", 10.5)
    schedule.wait_for("route", "nexthop")
    assert schedule.next_due() == 11.5
    assert schedule.due("route", 11.5)
    schedule.failed("route", 11.5)
    assert schedule.next_due() == 11.5, "the nexthop's"
    schedule.wait_for("route", "nobody")
    schedule.wait_for("nobody", "route")
    assert schedule.due("nobody", 0.0)
    schedule.succeeded("nexthop")
    assert schedule.next_due() == 13.5, "its second failure"


def test_etcd_is_asked_for_signs_of_life_so_often_that_it_can_bear_it() -> None:
    """A fault must be told within five seconds, of which the answer has two."""
    assert probe_seconds(0) == probe_seconds(900) == 2.25
    assert 10_000 / probe_seconds(10_000) == 400
    assert probe_seconds(1_000_000) == 60
