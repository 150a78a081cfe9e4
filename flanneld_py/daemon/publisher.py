"""The thread that says what is going on: status.json, READY and STATUS to systemd."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from flanneld_py.daemon.checks import ready_checks
from flanneld_py.daemon.inbox import Inbox, Levels, boottime
from flanneld_py.daemon.notify import Notifier
from flanneld_py.daemon.status import Process, compose, may_start, one_line, why_not_ready
from flanneld_py.drivers.files import write_atomically

REST, REST_BEFORE_READY = 0.1, 0.005
"""Seconds between two publications: a burst of changes is one file, but READY is not kept waiting."""
RETRY = 5.0
"""Seconds until status.json is tried again when it could not be written."""
LOOK = 3.0
"""Seconds between looks at what tells nobody: time that goes by, and subnet.env."""


class Publisher:
    """Writes the status when it has changed, or its file is gone."""

    def __init__(
        self,
        inbox: Inbox,
        process: Process,
        path: Path,
        notifier: Notifier,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`look` is called at each change and every LOOK seconds, to offer what it finds."""
        self._inbox = inbox
        self._process = process
        self._path = path
        self._notifier = notifier
        self._look = look
        self._log = structlog.get_logger().bind(part="status")
        self._published: dict[str, Any] = {}
        self._line = ""
        self._told_ready = False
        """READY was sent; whether it goes through is the notifier's care."""
        self._ready = True
        """As the log has it."""
        self._failing = False
        self._due = 0.0
        """When to try again to write the file."""

    def run(self) -> None:
        """Until the inbox stops."""
        seen = -1
        while not self._inbox.stopped:
            last = seen
            seen, levels = self._inbox.wait(seen, boottime() + LOOK)
            self._look()
            self._notifier.send_owed()
            if seen == last and not self._is_outdated(levels):
                continue
            status = compose(levels, self._process)
            if self._inbox.stopped:  # the threads end now, which is no news
                return
            self.publish(status)
            self._inbox.pause(REST if self._told_ready else REST_BEFORE_READY)

    def _is_outdated(self, levels: Levels) -> bool:
        """Whether what was published is not so any more, though no level has changed, or is not there."""
        checks = ready_checks(levels, boottime(), self._process.hanging())
        known = self._published["checks"]
        return (
            (self._failing and boottime() >= self._due)
            or not os.path.lexists(self._path)
            or any(check.ok != known[check.name]["ok"] for check in checks)
        )

    def publish(self, status: dict[str, Any]) -> None:
        unchanged = _without_times(status) == _without_times(self._published)
        if unchanged and not self._failing and os.path.lexists(self._path):
            return
        self._published = status
        self._notify(status)
        try:
            write_atomically(self._path, json.dumps(status, indent=1) + "\n")
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._log.warning("status_not_written", path=str(self._path), error=str(error))
            self._failing, self._due = True, boottime() + RETRY

    def _notify(self, status: dict[str, Any]) -> None:
        if may_start(status) and not self._told_ready:
            self._told_ready = True
            self._log.info(
                "ready", backend=status["backend"], subnets=status["subnets"], peers=status["peers"]["count"]
            )
            self._notifier.send(READY="1", STATUS=one_line(status))
        elif one_line(status) != self._line:
            self._notifier.send(STATUS=one_line(status))
        self._line = one_line(status)
        if self._told_ready and status["ready"] != self._ready and status["state"] != "stopped":
            self._ready = status["ready"]
            if self._ready:
                self._log.info("ready_again")
            else:
                self._log.warning("not_ready", reason=why_not_ready(status))


def _without_times(status: dict[str, Any]) -> dict[str, Any]:
    """A later `since` of the same problem is no change, nor are packets that were counted meanwhile."""
    problems = [{**problem, "since": None} for problem in status.get("problems", [])]
    plane = status.get("data_plane")
    return {**status, "problems": problems, "data_plane": plane and {**plane, "traffic": None}}
