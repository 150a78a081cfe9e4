"""Everything that a run leaves behind, as values: what the invariants are checked against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.chaos.history import Event
    from tests.chaos.probes import Flow, Traffic
    from tests.chaos.schedule import Schedule
    from tests.chaos.watchers import RouteGone, Seen
    from tests.chaos.windows import Done, Window
    from tests.chaos.world import Notes


@dataclass(frozen=True, slots=True)
class End:
    """How a host was found when all was healed and the wait was over."""

    host: str
    differences: Sequence[str]
    """Between its kernel and the registry."""
    status: str
    """What is wrong by its own account; empty: nothing."""
    foreign_before: Sequence[str]
    foreign_after: Sequence[str]
    rules_before: str
    rules_after: str
    log_lines: int
    """Of all its daemons together."""
    tracebacks: Sequence[str]
    """From its logs."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One run. Times are those of time.monotonic()."""

    schedule: Schedule
    hosts: Mapping[str, str]
    """Name → node id, of the hosts that were there all the time."""
    began: float
    healed: float
    """When the last fault was healed."""
    settled: float
    """When the wait was over; after this nothing may change."""
    stopped: float
    """When the traffic ended."""
    done: Sequence[Done]
    windows: Sequence[Window]
    traffic: Traffic
    flows: Sequence[Flow]
    events: Sequence[Event]
    """Of etcd's whole history."""
    history_gaps: Sequence[int]
    """Revisions that nobody saw."""
    etcd_leases: Sequence[str]
    mirror: str
    """What tests.chaos.mirror wrote."""
    seen: Seen
    routes_gone: Sequence[RouteGone]
    notes: Notes
    ends: Sequence[End]
    skipped: Sequence[str] = field(default_factory=list)
    """Faults that could not be caused."""

    def time(self, at: float) -> str:
        """Seconds since the beginning, as the schedule has them."""
        return f"{at - self.began:.1f} s"
