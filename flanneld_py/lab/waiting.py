"""Errors of the lab, and waiting for a condition instead of for a time."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class LabError(Exception):
    """The lab could not do what was asked; `str()` says what and why."""


class WaitTimeout(LabError):
    """A condition did not come true in time."""


class CommandFailed(LabError):
    """A command ended with another exit code than 0, or not in time."""

    def __init__(self, argv: Sequence[str], outcome: str, stdout: str, stderr: str) -> None:
        self.argv = tuple(argv)
        self.stdout = stdout
        self.stderr = stderr
        said = (stderr.strip() or stdout.strip() or "it said nothing")[-2000:]
        super().__init__(f"`{shlex.join(argv)}` {outcome}: {said}")


def wait_for(
    read: Callable[[], T],
    timeout: float,
    what: str,
    until: Callable[[T], object] = bool,
    interval: float = 0.005,
) -> T:
    """Read again and again until `until(value)` is true, and return that value.

    Args:
        read: gives the value; what it raises ends the wait.
        timeout: seconds; the value is read at least once, and once more at the end.
        what: completes "waited … s for", as in "the route to 10.5.2.0/24".
        until: true when the wait is over; by default when the value itself is true.
        interval: seconds between two readings.

    Raises:
        WaitTimeout: names what was awaited and the last value seen.
    """
    deadline = time.monotonic() + timeout
    while True:
        last_try = time.monotonic() >= deadline
        value = read()
        if until(value):
            return value
        if last_try:
            raise WaitTimeout(f"waited {timeout:g} s for {what}; last seen: {value!r}")
        time.sleep(interval)
