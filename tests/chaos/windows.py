"""Which hosts a fault may have harmed, and until when: pure, from what was done when.

A fault excuses lost packets from its beginning until everything that its repair needs has worked for a while.
Whatever is lost outside of these windows, nobody is to blame for but the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.chaos.fault import LONG_AFTER, SOON_AFTER

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TOUCHES_WITHIN = 15.0
"""Seconds after a fault within which a status may still tell of it."""


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was caused, with times of time.monotonic()."""

    number: int
    fault: str
    targets: tuple[str, ...]
    start: float
    healed: float
    """FOREVER: not so far."""
    grace: float
    breaks: frozenset[str]
    """Hosts whose packets may be lost; `*`: all; `pair`: only those between the targets."""
    latent: bool
    needs: frozenset[str]
    disables: frozenset[str]
    disables_for: float
    stirs: frozenset[str]
    told_after: float

    @property
    def back(self) -> float:
        """When what it disables works again, before its grace."""
        return min(self.healed, self.start + self.disables_for)

    def __str__(self) -> str:
        return f"#{self.number} {self.fault} {' '.join(self.targets)}".rstrip()


@dataclass(frozen=True, slots=True)
class Window:
    """From when to when whose packets may be lost."""

    start: float
    end: float
    hosts: frozenset[str]
    between: bool
    """Only what both ends of which are in `hosts`."""
    why: str

    def excuses(self, source: str, target: str, at: float) -> bool:
        if not self.start <= at <= self.end:
            return False
        if "*" in self.hosts:
            return True
        ends = (source in self.hosts, target in self.hosts)
        return all(ends) if self.between else any(ends)


def windows(done: Sequence[Done], names: Iterable[str], ttl: float) -> list[Window]:
    """Those of all faults, and of hosts whose lease may have ended because nobody could renew it."""
    found = []
    for fault in done:
        end = repaired(fault, done)
        if fault.latent and end <= fault.healed + fault.grace:
            continue
        if fault.breaks:
            between = "pair" in fault.breaks
            hosts = frozenset(fault.targets) if between else fault.breaks
            found.append(Window(fault.start - 0.1, end, hosts, between, str(fault)))
    return found + [window for name in names for window in _expired(name, done, ttl)]


def repaired(fault: Done, done: Sequence[Done]) -> float:
    """When what it harmed must be whole: healed, and all that this needs has worked for its grace."""
    end = fault.healed + fault.grace
    disabling = [other for other in done if other is not fault and _meets(fault.needs, other.disables)]
    while True:
        later = max(
            (
                works + fault.grace
                for other in disabling
                if other.start <= end and (works := other.back + other.grace) > fault.start
            ),
            default=end,
        )
        if later <= end:
            return end
        end = later


def _meets(needs: Iterable[str], disabled: Iterable[str]) -> bool:
    """Whether any of these is any of those; the name behind the colon may be `*` in both."""
    pairs = [(need.split(":"), other.split(":")) for need in needs for other in disabled]
    return any(a[0] == b[0] and (a[1] == b[1] or "*" in {a[1], b[1]}) for a, b in pairs)


def _expired(name: str, done: Sequence[Done], ttl: float) -> list[Window]:
    """Without daemon or registry for two thirds of a TTL a lease may end before it is renewed again."""
    needs = (f"daemon:{name}", f"registry:{name}")
    spans = sorted((other.start, other.back + SOON_AFTER) for other in done if _meets(needs, other.disables))
    joined: list[list[float]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    why = f"the lease of {name} may have ended"
    return [
        Window(start + ttl * 2 / 3, end + LONG_AFTER, frozenset({name}), False, why)
        for start, end in joined
        if end - start > ttl * 2 / 3
    ]


def touching(name: str, at: float, done: Sequence[Done]) -> list[Done]:
    """Faults that a host's status may tell of at a time: those that are under way or just over."""
    found = []
    for fault in done:
        concerns = {part.rpartition(":")[2] for part in (*fault.disables, *fault.breaks, *fault.stirs)} | set(
            fault.targets
        )
        anybody = not fault.targets or "*" in concerns
        if (anybody or name in concerns) and fault.start - 0.5 <= at <= repaired(
            fault, done
        ) + TOUCHES_WITHIN:
            found.append(fault)
    return found
