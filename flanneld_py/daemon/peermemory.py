"""The thread that writes down who our peers are, for the next run. A disk that hangs delays nobody."""

from __future__ import annotations

from pathlib import Path

import structlog

from flanneld_py.core.lastpeers import render_peers
from flanneld_py.daemon.inbox import Inbox, Levels
from flanneld_py.drivers.files import write_atomically
from flanneld_py.model import Record

AT_MOST_EVERY = 30.0
"""Seconds: of ten thousand peers there are megabytes, and some peer changes all the time."""


class PeerMemory:
    """Saves what the reconciler reports."""

    def __init__(self, inbox: Inbox, prefix: str, path: Path) -> None:
        self._inbox = inbox
        self._prefix = prefix
        self._path = path
        self._saved: tuple[Record, ...] | None = None
        self._error = ""
        self._log = structlog.get_logger().bind(part="peers")

    def run(self) -> None:
        """Until the inbox stops, and once more then."""
        seen = -1
        while not self._inbox.stopped:
            seen, levels = self._inbox.wait(seen)
            if self._save(levels):
                self._inbox.pause(AT_MOST_EVERY)
                seen = -1
        self._save(self._inbox.levels)

    def _save(self, levels: Levels) -> bool:
        """Whether there was something to save, also if that failed: the next try has to wait as long."""
        snapshot, peers = levels.snapshot, levels.report.peers.accepted
        # Before the first pass there are none because nobody has looked.
        if snapshot is None or not levels.report.passes or peers == self._saved:
            return False
        text = render_peers(self._prefix, snapshot.cluster_id, snapshot.revision, peers)
        try:
            write_atomically(self._path, text)
            self._saved, self._error = peers, ""
        except OSError as error:
            if str(error) != self._error:
                self._log.warning("peers_not_saved", path=str(self._path), error=str(error))
            self._error = str(error)
        return True
