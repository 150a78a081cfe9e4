"""The thread that says what is going on: status.json, READY and STATUS to systemd."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import structlog

from flanneld_py.daemon.inbox import Inbox, boottime
from flanneld_py.daemon.notify import Notifier
from flanneld_py.daemon.status import Process, compose, one_line
from flanneld_py.drivers.files import write_atomically

REST, REST_BEFORE_READY = 0.1, 0.005
"""Seconds between two publications: a burst of changes is one file, but READY is not kept waiting."""


RETRY = 5.0
"""Seconds until status.json is tried again when it could not be written."""


class Publisher:
    """Writes the status when it has changed, or its file is gone."""

    def __init__(self, inbox: Inbox, process: Process, path: Path, notifier: Notifier) -> None:
        self._inbox = inbox
        self._process = process
        self._path = path
        self._notifier = notifier
        self._log = structlog.get_logger().bind(part="status")
        self._published: dict[str, Any] = {}
        self._line = ""
        self._ready = False
        self._failing = False

    def run(self) -> None:
        """Until the inbox stops."""
        seen = -1
        while not self._inbox.stopped:
            seen, levels = self._inbox.wait(seen, boottime() + RETRY if self._failing else None)
            self.publish(compose(levels, self._process))
            self._inbox.pause(REST if self._ready else REST_BEFORE_READY)

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
            self._failing = True

    def _notify(self, status: dict[str, Any]) -> None:
        if status["ready"] and not self._ready:
            self._ready = True
            self._log.info(
                "ready", backend=status["backend"], subnets=status["subnets"], peers=status["peers"]["count"]
            )
            self._notifier.send(READY="1", STATUS=one_line(status))
        elif one_line(status) != self._line:
            self._notifier.send(STATUS=one_line(status))
        self._line = one_line(status)


def _without_times(status: dict[str, Any]) -> dict[str, Any]:
    """A later `since` of the same problem is no change."""
    problems = [{**problem, "since": None} for problem in status.get("problems", [])]
    return {**status, "problems": problems}
