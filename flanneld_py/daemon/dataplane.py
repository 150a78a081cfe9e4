"""The thread that looks after what forwards packets in user space, where the backend has such a thing."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from msgspec.structs import replace

from flanneld_py.daemon.inbox import DataPlane, Inbox, Problem, boottime
from flanneld_py.daemon.losswatch import LossWatch
from flanneld_py.drivers.files import write_atomically
from flanneld_py.udp.kept import Kept
from flanneld_py.udp.tunnel import Look, Tunnel
from flanneld_py.udp.worker import NOT_LOADED

EVERY = 1.0
"""Seconds."""
SMALL, SAVE_EVERY, SAVE_LARGE_EVERY = 1 << 16, 1.0, 10.0
"""Bytes and seconds: of ten thousand peers there are 200 KB, and some peer changes all the time."""
FIX = "none is needed, as it is started again by itself; if it goes on, set Backend.DataPlane to python"
FIX_PYTHON = "none is needed, as it is started again by itself; if it goes on, report it"
FIX_NOT_NATIVE = (
    "apt-get install gcc python3-dev, make install, restart flanneld-py; or set Backend.DataPlane to auto"
)
FIX_CRASHED = "report it; native is tried again after an hour, or after a restart of flanneld-py"


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
        self._said: Mapping[str, Any] = {}
        self._unsaved: bytes | None = None
        self._save_at = 0.0
        self._save_error = ""
        self._losses = LossWatch(inbox)
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
            self._losses.look(self.counters)
            self._save()
            # With nothing to look after, until the reconciler has made it.
            idle = look is None and self._unsaved is None
            seen, _ = self._inbox.wait(seen, None if idle else boottime() + EVERY)
        self._save_at = 0.0
        self._save()

    def _tell(self, look: Look | None) -> None:
        known, problem = self._inbox.levels.data_plane, self._inbox.levels.data_plane_problem
        plane = _plane_of(look)
        fallback = self._inbox.levels.fallback_problem
        wrong = _down(look, problem, in_python=fallback is not None)
        for reason in look.mended if look else ():
            self._log.warning("data_plane_restarted", reason=reason)
        if wrong is not None and problem is None:
            self._log.error("data_plane_down", reason=wrong.reason)
        if plane is None or plane.runs:  # else it is not known yet what will run
            fallback = _fallback(plane)
        if plane is not None and plane.runs and plane != known:
            self._say(plane, fallback)
        levels = self._inbox.levels
        if plane != known or wrong != problem or fallback != levels.fallback_problem:
            self._inbox.offer(data_plane=plane, data_plane_problem=wrong, fallback_problem=fallback)
        if problem is not None and wrong is None:
            self._inbox.kernel_changed()

    def _say(self, plane: DataPlane, fallback: Problem | None) -> None:
        """Which one runs, when that or what it was told is news."""
        news = {
            "device": plane.device,
            "runs": plane.runs,
            **({"why": plane.why} if plane.why else {}),
            "port": plane.port,
            "source_check": plane.source_check,
            "offloads": list(plane.offloads),
        }
        if news != self._said:
            (self._log.info if fallback is None else self._log.warning)("data_plane", **news)
        self._said = news

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


def take_over(
    tunnel: Tunnel, kept: Kept, saved: Callable[[], str], ours: Callable[[], Collection[str]]
) -> None:
    """Go on with what an earlier process left: a pump that was resumed, else what is in the file.

    `ours` reads the names of our devices.
    """
    if kept.resumed is not None and tunnel.adopt(kept.resumed):
        return
    names = ours()
    tunnel.salvage(kept.fds if kept.resumed is None else kept.resumed.release(), names)
    with suppress(ValueError):
        tunnel.recall(b64decode(saved()), names)


def _plane_of(look: Look | None) -> DataPlane | None:
    if look is None:
        return None
    plane = DataPlane(look.device, "", restarts=look.restarts)
    if look.settings is not None:
        told = look.settings
        plane = replace(plane, asked=told.plane, port=told.port, source_check=told.source_check)
    if look.running is None:
        return plane
    running = look.running
    return replace(plane, runs=running.plane, why=running.why, pid=running.pid, offloads=running.offloads)


def _down(look: Look | None, known: Problem | None, *, in_python: bool) -> Problem | None:
    """Why nothing forwards; one that goes on for another reason is as old as it was.

    `in_python`: it had fallen back to that.
    """
    if look is None or not look.wrong:
        return None
    in_python = in_python or (look.settings is not None and look.settings.plane == "python")
    fresh = Problem("data-plane", look.wrong, FIX_PYTHON if in_python else FIX)
    return fresh if known is None else replace(fresh, since=known.since)


def _fallback(plane: DataPlane | None) -> Problem | None:
    """That it runs in Python, where that is neither what was asked for nor how it was installed."""
    if plane is None or plane.runs != "python" or plane.asked == "python":
        return None
    if plane.why.startswith(NOT_LOADED):
        if plane.asked == "auto":
            return None
        reason, fix = f"Backend.DataPlane native: {plane.why}", FIX_NOT_NATIVE
    else:
        reason, fix = plane.why, FIX_CRASHED
    return Problem("data-plane-python", f"packets are forwarded in Python, which is slower: {reason}", fix)
