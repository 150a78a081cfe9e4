"""When wrong checksums count as many: a counter's readings over a minute."""

from __future__ import annotations

import pytest

from flanneld_py.core.checksums import MANY, WINDOW, Reading, arrived, recent, too_many


def after(*readings: tuple[float, int]) -> tuple[Reading, ...]:
    """What is remembered of these readings, one after the other."""
    known: tuple[Reading, ...] = ()
    for at, errors in readings:
        known = recent(known, Reading(at, errors))
    return known


@pytest.mark.parametrize(
    ("readings", "many"),
    [
        ((), False),
        # How many came before the first look is no news.
        (((0, 10_000),), False),
        (((0, 7), (2, 7 + MANY - 1)), False),
        (((0, 7), (2, 7 + MANY)), True),
        (((0, 0), (30, MANY // 2), (WINDOW, MANY)), True),
        # As slowly as that is no harm.
        (tuple((float(n), n // 10) for n in range(0, 600, 2)), False),
        (tuple((float(n), n // 5) for n in range(0, 600, 2)), True),
    ],
)
def test_how_many_within_the_window(readings: tuple[tuple[float, int], ...], many: bool) -> None:
    assert too_many(after(*readings)) == many


def test_what_came_between_two_readings_far_apart_counts() -> None:
    """As after a suspend: when exactly they came nobody knows."""
    known = after((0, 0), (1, 2), (1 + 10 * WINDOW, 2 + MANY))
    assert (arrived(known), too_many(known)) == (MANY, True)


def test_no_more_is_remembered_than_the_window_needs() -> None:
    known = after(*((float(n), 0) for n in range(0, 10_000, 2)))
    assert len(known) <= WINDOW / 2 + 2
