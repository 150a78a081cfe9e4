"""Whether subnet.env still stands as it was written. No netlink event tells that somebody removed it."""

from __future__ import annotations

import threading
from pathlib import Path

from flanneld_py.daemon.inbox import Inbox, Levels, Problem, boottime
from flanneld_py.drivers.files import read_text

ASK_EVERY = 2.0
"""Seconds; a pass reads all of the kernel."""
FIX = "nothing, if its directory can be written: it is put back by itself"


class SubnetFileWatch:
    """Offers `subnet_file_problem`, and has the file put back. Any thread may call."""

    def __init__(self, path: Path, inbox: Inbox) -> None:
        self._path = path
        self._inbox = inbox
        self._lock = threading.Lock()
        self._other_since: int | None = None
        """Number of passes when it was first seen to hold something else."""
        self._asked_at = 0.0
        """When it was last asked to be put back, by `boottime`."""

    def look(self) -> None:
        """Read the file once."""
        with self._lock:
            levels = self._inbox.levels
            if not levels.report.subnet_file_written:
                return
            reason, known = self._fault(levels), levels.subnet_file_problem
            if reason != (known.reason if known else ""):
                self._inbox.offer(subnet_file_problem=Problem("subnet-file", reason, FIX) if reason else None)
                self._asked_at = 0.0
            # Somebody may have removed it again before it was seen that it was back.
            if reason and boottime() >= self._asked_at + ASK_EVERY:
                self._asked_at = boottime()
                self._inbox.kernel_changed()

    def _fault(self, levels: Levels) -> str:
        try:
            text = read_text(self._path)
        except OSError as error:
            return f"{self._path} cannot be read: {error.strerror}"
        if text == levels.report.subnet_env:
            self._other_since = None
            return ""
        if text is None:
            return f"{self._path} is missing"
        if self._other_since is None:
            # Perhaps it is we who wrote it, in a pass that is not reported yet.
            self._other_since = levels.report.passes
            self._inbox.kernel_changed()
        if levels.report.passes == self._other_since:
            return ""
        return f"{self._path} holds something else than we wrote"
