"""Tells of packets that the data plane drops all the time."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from flanneld_py.core.losses import TOLD, Reading, decide_losses, latest
from flanneld_py.daemon.inbox import Inbox, Levels, Problem, boottime

REST = 60.0
"""Seconds between two lines of the log."""


class LossWatch:
    """Offers `loss_problem`. One thread looks, about once a second."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._log = structlog.get_logger().bind(part="data-plane")
        self._readings: tuple[Reading, ...] = ()
        self._told = ""
        """The reason that the log was last told of; empty: that it is over."""
        self._next = 0.0

    def look(self, counters: Mapping[str, int]) -> None:
        """At what was counted, by the names of udp/pump.h; empty: nothing was."""
        now, known = boottime(), self._inbox.levels.loss_problem
        drops = {name.replace(".drop.", "."): number for name, number in counters.items() if ".drop." in name}
        if drops:
            self._readings = latest(self._readings, Reading(now, drops))
        elif self._inbox.levels.data_plane is None:
            self._readings = ()
        fresh = _problem(decide_losses(self._readings), self._inbox.levels)
        if fresh != known:
            self._inbox.offer(loss_problem=fresh)
        self._say(fresh, now)

    def _say(self, problem: Problem | None, now: float) -> None:
        reason = problem.reason if problem is not None else ""
        if reason == self._told or now < self._next:
            return
        if problem is None:
            self._log.info("packets_dropped_over")
        else:
            self._log.warning("packets_dropped", reason=reason, fix=problem.fix)
        self._told, self._next = reason, now + REST


def _problem(losses: tuple[str, ...], levels: Levels) -> Problem | None:
    plane, host = levels.data_plane, levels.host
    if not losses or plane is None:
        return None
    words = {
        "device": plane.device,
        "port": plane.port,
        "interface": host.external.name if host else "any",
    }
    said = [(name, TOLD[name]) for name in losses]
    reasons = (f"{advice.meaning.format(**words)} ({name.partition('.')[2]})" for name, advice in said)
    fixes = (advice.fix.format(**words) for _, advice in said)
    return Problem("packets-dropped", "; ".join(reasons), "; ".join(fixes))
