"""The thread that looks after what forwards packets in user space, where the backend has such a thing."""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from flanneld_py.daemon.inbox import DataPlane, Inbox, Problem, boottime
from flanneld_py.drivers.files import write_atomically
from flanneld_py.udp.kept import TUN, Kept
from flanneld_py.udp.tunnel import Look, Tunnel
from flanneld_py.udp.tuns import Tuns, name_of

EVERY = 1.0
"""Seconds."""
SMALL, SAVE_EVERY, SAVE_LARGE_EVERY = 1 << 16, 1.0, 10.0
"""Bytes and seconds: of ten thousand peers there are 200 KB, and some peer changes all the time."""
FIX = "none is needed, as it is started again by itself; if it goes on, set Backend.DataPlane to python"


class DataPlaneWatch:
    """Offers `data_plane` and its problem; keeps what the next process begins with.

    Args:
        look: looks at the data plane, and mends it.
        path: where what it works with is kept; empty once there is none.
    """

    def __init__(self, inbox: Inbox, look: Callable[[], Look | None], path: Path) -> None:
        self._inbox = inbox
        self._look = look
        self._path = path
        self._log = structlog.get_logger().bind(part="data-plane")
        self._unsaved: bytes | None = None
        self._save_at = 0.0
        self._save_error = ""
        self.counters: Mapping[str, int] = {}
        """As of the latest look."""

    def remember(self, whole: bytes) -> None:
        """To be saved soon; any thread."""
        self._unsaved = whole
        self._inbox.poke()

    def run(self) -> None:
        """Until the inbox stops."""
        seen = -1
        while not self._inbox.stopped:
            look = self._look()
            self.counters = look.counters if look else {}
            self._tell(look)
            self._save()
            # With nothing to look after, until the reconciler has made it.
            idle = look is None and self._unsaved is None
            seen, _ = self._inbox.wait(seen, None if idle else boottime() + EVERY)
        self._save_at = 0.0
        self._save()

    def _tell(self, look: Look | None) -> None:
        known, problem = self._inbox.levels.data_plane, self._inbox.levels.data_plane_problem
        plane = _plane_of(look)
        wrong = Problem("data-plane", look.wrong, FIX) if look and look.wrong else None
        for reason in look.mended if look else ():
            self._log.warning("data_plane_restarted", reason=reason)
        if wrong is not None and problem is None:
            self._log.error("data_plane_down", reason=wrong.reason)
        if plane is not None and plane.runs and (known is None or known.runs != plane.runs):
            self._log.info(
                "data_plane",
                device=plane.device,
                runs=plane.runs,
                why=plane.why,
                offloads=list(plane.offloads),
            )
        if plane != known or wrong != problem:
            self._inbox.offer(data_plane=plane, data_plane_problem=wrong)
        if problem is not None and wrong is None:
            self._inbox.kernel_changed()

    def _save(self) -> None:
        whole = self._unsaved
        if whole is None or boottime() < self._save_at:
            return
        self._unsaved = None
        self._save_at = boottime() + (SAVE_EVERY if len(whole) < SMALL else SAVE_LARGE_EVERY)
        try:
            if whole:
                write_atomically(self._path, b64encode(whole).decode())
            else:
                self._path.unlink(missing_ok=True)
            self._save_error = ""
        except OSError as error:
            if str(error) != self._save_error:
                self._log.warning("tunnel_not_saved", path=str(self._path), error=str(error))
            self._save_error = str(error)


def take_over(tunnel: Tunnel, tuns: Tuns, kept: Kept, saved: Callable[[], str]) -> None:
    """Go on with what an earlier process left: a pump that was resumed, else what is in the file."""
    if kept.resumed is not None and tunnel.adopt(kept.resumed):
        return
    if kept.resumed is None and kept.fds:
        for name, fd in kept.fds.items():
            if name == TUN and (device := name_of(fd)):
                tuns.adopt(device, fd)  # it takes one reader
            else:
                os.close(fd)
    with suppress(ValueError):
        tunnel.recall(b64decode(saved()))


def _plane_of(look: Look | None) -> DataPlane | None:
    if look is None:
        return None
    if look.running is None:
        return DataPlane(look.device, "", restarts=look.restarts)
    running = look.running
    return DataPlane(look.device, running.plane, running.why, running.pid, running.offloads, look.restarts)
