"""When drops are lost traffic, and when a stray packet."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flanneld_py.core.losses import RISES, TOLD, WINDOW, Reading, decide_losses, latest
from flanneld_py.udp.pycounts import COUNTED, ONE_WAY

UNKNOWN = "receive.outer-source-unknown"


def readings(counts: Sequence[int], name: str = UNKNOWN) -> tuple[Reading, ...]:
    """One a second, as they are kept."""
    found: tuple[Reading, ...] = ()
    for second, number in enumerate(counts):
        found = latest(found, Reading(float(second), {name: number}))
    return found


@pytest.mark.parametrize("name", TOLD)
def test_drops_that_go_on_are_losses(name: str) -> None:
    assert decide_losses(readings([0, 1, 2, 3], name)) == (name,)


@pytest.mark.parametrize("counts", [[], [0], [7], [0, 1, 1, 1], [0, 0, 5000, 5000], [0, 1, 2, 2, 2]])
def test_stray_packets_and_a_short_burst_are_none(counts: Sequence[int]) -> None:
    assert decide_losses(readings(counts)) == ()


def test_what_was_counted_before_the_first_look_is_none() -> None:
    assert decide_losses(readings([1_000_000] * 10)) == ()


def test_a_ping_every_ten_seconds_is_seen_as_well() -> None:
    assert decide_losses(readings([second // 10 for second in range(int(WINDOW) + 1)])) == (UNKNOWN,)


def test_they_are_over_some_seconds_after_the_last_one() -> None:
    counts = [0, 1, 2, 3]
    assert decide_losses(readings([*counts, *[3] * 4])) == (UNKNOWN,)
    assert decide_losses(readings([*counts, *[3] * 5])) == ()


def test_those_of_a_slow_ping_are_over_after_two_of_its_intervals() -> None:
    counts = [second // 8 for second in range(25)]
    assert decide_losses(readings([*counts, *[3] * 16])) == ()
    assert decide_losses(readings([*counts, *[3] * 5])) == (UNKNOWN,)


def test_old_readings_are_forgotten() -> None:
    assert len(readings([0] * 2 * int(WINDOW))) == WINDOW + 1


def test_drops_of_other_kinds_are_anybodys() -> None:
    assert decide_losses(readings([0, 1, 2, 3], "receive.version")) == ()


def test_looks_in_short_order_are_one() -> None:
    found: tuple[Reading, ...] = ()
    for number in range(10):
        found = latest(found, Reading(5 + number / 10, {UNKNOWN: number}))
    assert len(found) == 1
    assert RISES > 1


def test_a_clock_that_begins_anew_forgets() -> None:
    """Nothing older is kept beside it."""
    assert latest(readings([0, 1, 2]), Reading(-100.0, {})) == (Reading(-100.0, {}),)


@pytest.mark.parametrize("name", TOLD)
def test_each_is_counted_in_its_direction_and_tells_what_to_do(name: str) -> None:
    way, _, reason = name.partition(".")
    assert f"drop.{reason}" in COUNTED
    assert reason in ONE_WAY[way]
    words = {"device": "flannel0", "port": 8285, "interface": "eth0"}
    assert "{" not in TOLD[name].meaning.format(**words) + TOLD[name].fix.format(**words)
    assert TOLD[name].fix
