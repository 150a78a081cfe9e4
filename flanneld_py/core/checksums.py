"""When packets with wrong checksums keep arriving: a pure judgement over a counter's readings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 60.0
"""Seconds."""
MANY = 10
"""Within the window; fewer may be broken cables far away, or somebody who guesses."""


class Reading(NamedTuple):
    """The counter at one time."""

    at: float
    """Boottime in seconds."""
    errors: int


def recent(readings: Sequence[Reading], latest: Reading) -> tuple[Reading, ...]:
    """The readings of the window that ends with `latest`, and the last one before it."""
    begin = latest.at - WINDOW
    within = [reading for reading in readings if reading.at >= begin]
    before = [reading for reading in readings if reading.at < begin][-1:]
    return (*before, *within, latest)


def arrived(readings: Sequence[Reading]) -> int:
    """How many came within the window."""
    return readings[-1].errors - readings[0].errors if readings else 0


def too_many(readings: Sequence[Reading]) -> bool:
    return arrived(readings) >= MANY
