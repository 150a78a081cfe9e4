"""Who looks on while faults happen: at statuses and processes, at subnet.env, at routes that go."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flanneld_py.lab import Host
    from flanneld_py.lab.process import Process
    from tests.chaos.world import World

SAMPLE_EVERY = 0.5
FILE_EVERY = 0.02
TICK = 1 / os.sysconf("SC_CLK_TCK")
_DELETED = re.compile(r"^\[(\S+)\] ?Deleted (\S+) .*\bproto 96\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one daemon said of itself, and what it used until then."""

    at: float
    host: str
    pid: int
    state: str
    ready: bool
    codes: tuple[str, ...]
    cpu: float
    """Seconds since it started."""
    rss: int
    """MiB."""
    threads: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class FileSeen:
    """A content of subnet.env, when it was seen first; None: no such file."""

    at: float
    host: str
    text: str | None


@dataclass(frozen=True, slots=True)
class RouteGone:
    """A route of ours that a host's kernel reported as deleted."""

    at: float
    host: str
    destination: str


@dataclass(slots=True)
class Seen:
    """All that was seen."""

    samples: list[Sample] = field(default_factory=list)
    files: list[FileSeen] = field(default_factory=list)
    stalls: list[tuple[float, float]] = field(default_factory=list)
    """When this machine did not let us look for how many seconds."""


class Watchers:
    """Threads and processes that note what they see."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.seen = Seen()
        self._over = threading.Event()
        self._monitors: list[tuple[str, Process]] = []
        self._offset = time.time() - time.monotonic()
        for host in world.lab.hosts:
            self._listen(host)
        world.on_boot = self._listen
        self._hosts = list(world.lab.hosts)
        self._threads = [
            threading.Thread(target=self._sample, daemon=True),
            threading.Thread(target=self._poll_files, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self, host: Host) -> None:
        for name, process in self._monitors:
            if name == host.name:
                process.kill()  # it would keep the network of before
        monitor = host.spawn("monitor", ["ip", "-ts", "monitor", "route"])
        self._monitors.append((host.name, monitor))

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(10)

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_EVERY):
            for host in self._hosts:
                with suppress(OSError, ValueError, KeyError):
                    self.seen.samples.append(_sample(host))

    def _poll_files(self) -> None:
        last: dict[str, str | None] = {}
        before = time.monotonic()
        while not self._over.wait(FILE_EVERY):
            now = time.monotonic()
            if now - before > 1:
                self.seen.stalls.append((before, now - before))
            before = now
            for host in self._hosts:
                try:
                    text: str | None = host.subnet_file.read_text()
                except FileNotFoundError:
                    text = None
                if host.name not in last or last[host.name] != text:
                    self.seen.files.append(FileSeen(time.monotonic(), host.name, text))
                last[host.name] = text

    def routes_gone(self) -> list[RouteGone]:
        """Of all hosts, those with the protocol that marks ours."""
        return [
            gone
            for name, process in self._monitors
            for gone in _routes_gone(name, process.stdout.read_text(), self._offset)
        ]


def _sample(host: Host) -> Sample:
    status: dict[str, Any] = json.loads(host.status_file.read_text())
    pid = status["pid"]
    process = Path(f"/proc/{pid}")
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return Sample(
        at=time.monotonic(),
        host=host.name,
        pid=pid,
        state=status["state"],
        ready=status["ready"],
        codes=tuple(problem["code"] for problem in status["problems"]),
        cpu=(int(fields[11]) + int(fields[12])) * TICK,
        rss=int(fields[21]) * os.sysconf("SC_PAGE_SIZE") >> 20,
        threads=int(fields[17]),
        descriptors=len(list((process / "fd").iterdir())),
    )


def _routes_gone(host: str, text: str, offset: float) -> list[RouteGone]:
    return [RouteGone(_seconds(stamp) - offset, host, to) for stamp, to in _DELETED.findall(text)]


def _seconds(stamp: str) -> float:
    """`2026-11-21T15:04:05.123456` in local time, as seconds since the epoch."""
    whole, _, fraction = stamp.partition(".")
    return time.mktime(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction or 0}")
