"""Who is measured with many leases: this project's daemon, and another program that takes flannel's flags."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flanneld_py.lab.crowd import NETWORK, UNDERLAY, Member
from flanneld_py.lab.hosts import Host
from flanneld_py.lab.process import Process, descendants
from flanneld_py.lab.waiting import LabError, wait_for

OURS, PEER = "flanneld-py", "peer"
TUNNEL_PORT = 8285
SAMPLED = 64
"""Subnets of which backend udp must have learnt the way before it counts as complete; then all are asked."""
_END = [sys.executable, "-I", "-S", str(Path(__file__).with_name("scale_end.py"))]
_LOOK = 0.001
_RSS = re.compile(r"^VmRSS:\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Subject:
    """One of the programs."""

    name: str
    program: Path | None = None
    """None: our own daemon."""


@dataclass(frozen=True, slots=True)
class Running:
    """A daemon at work."""

    host: Host
    process: Process
    started: float
    """By time.monotonic."""

    @property
    def _pids(self) -> list[int]:
        """Without what only leads into the namespace, which lasts as long but does nothing."""
        return descendants(self.process.pid)

    def rss(self) -> float:
        """MB of all its processes."""
        found = (_RSS.search(_read(f"/proc/{pid}/status")) for pid in self._pids)
        return sum(int(match[1]) for match in found if match) * 1024 / 1e6

    def cpu(self) -> float:
        """Seconds of processor that all its processes, those that have ended among them, have used."""
        ticks = 0
        for pid in self._pids:
            fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) if fields else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def subnet_file_after(self, timeout: float) -> float:
        """Seconds from exec to subnet.env.

        Raises:
            LabError: it ended instead, or took longer.
        """

        def there() -> float | None:
            self.check()
            path = self.host.subnet_file
            return time.monotonic() - self.started if path.exists() and path.stat().st_size else None

        return wait_for(there, timeout, "subnet.env", interval=_LOOK) or 0.0

    def check(self) -> None:
        """Raise LabError if it has ended."""
        if not self.process.running:
            raise LabError(
                f"{self.process.name} ended with {self.process.wait(1)}: {self.process.output()[-2000:]}"
            )

    def end(self) -> None:
        self.process.terminate(20)


def start(subject: Subject, host: Host) -> Running:
    """Start it on a host whose network has been made."""
    if subject.program is None:
        daemon = host.start_daemon()
        return Running(host, daemon.process, daemon.started)
    flags = {
        "etcd-endpoints": host.etcd.endpoint,
        "etcd-prefix": host.prefix,
        "iface": host.interface,
        "subnet-file": str(host.subnet_file),
        "ip-masq": "false",
    }
    started = time.monotonic()
    command = [str(subject.program.resolve()), *(f"-{flag}={value}" for flag, value in flags.items())]
    return Running(host, host.spawn("peer", command), started)


def prepare(host: Host, backend: str) -> None:
    """Its network, as the backend needs it. What is meant for the crowd ends at the router."""
    if backend == "host-gw":
        host.ip("address", "add", f"{UNDERLAY[1]}/{UNDERLAY.prefixlen}", "dev", "eth0")
    for network in (UNDERLAY, NETWORK):
        host.underlay.run(["ip", "route", "replace", "blackhole", str(network)])


def forget_run(host: Host, backend: str) -> None:
    """As after a reboot: the network is new and empty, and so is /run; the lease and --state-dir stand."""
    host.reboot()
    prepare(host, backend)


class Watched:
    """What a host's kernel, or the tunnel on it, knows of the crowd; see scale_end."""

    def __init__(self, host: Host, process: Process) -> None:
        self._host = host
        self.process = process

    def changes(self) -> list[tuple[float, int]]:
        """When (time.monotonic) there were how many."""
        text = self.process.stdout.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [(int(at) / 1e9, int(count)) for at, count in (line.split() for line in lines)]

    def reached(self, count: int, timeout: float, running: Running, *, since: float = 0.0) -> float:
        """When there were so many for the first time after `since` (time.monotonic).

        Raises:
            LabError: it took longer, or the daemon ended.
        """

        def found() -> float | None:
            running.check()
            if not self.process.running and self.process.wait(1):
                raise LabError(f"the watcher failed: {self.process.output()[-2000:]}")
            return next((at for at, seen in reversed(self._tail()) if seen == count and at >= since), None)

        wait_for(found, timeout, f"{count} routes", interval=0.005)
        return next(at for at, seen in self.changes() if seen == count and at >= since)

    def _tail(self) -> list[tuple[float, int]]:
        with self.process.stdout.open("rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - 200)
            file.seek(begin)
            lines = file.read().split(b"\n")[bool(begin) : -1]  # the first may be cut, the last unfinished
        return [(int(at) / 1e9, int(count)) for at, count in map(bytes.split, lines)]


@contextmanager
def watching_routes(host: Host) -> Iterator[Watched]:
    """How many routes into the overlay there are."""
    with _end(host, ["routes", str(NETWORK)]) as watched:
        wait_for(watched.changes, 10, "the watcher of routes")
        yield watched


@contextmanager
def watching_tunnel(host: Host, crowd: list[Member]) -> Iterator[Watched]:
    """To how many of these the way is known."""
    listed = host.directory / f"wanted-{len(crowd)}"
    listed.write_text("".join(f"{member.subnet} {member.address}\n" for member in crowd))
    with _end(host, ["tunnel", host.interface, str(TUNNEL_PORT), str(listed)]) as watched:
        wait_for(watched.changes, 10, "the watcher of the tunnel")
        yield watched


@contextmanager
def _end(host: Host, arguments: list[str]) -> Iterator[Watched]:
    process = host.spawn("watcher", [*_END, *arguments])
    try:
        yield Watched(host, process)
    finally:
        host.discard(process)
        process.stdout.unlink(missing_ok=True)


def check_rows(host: Host, backend: str, count: int) -> None:
    """Raise LabError unless every table has at least so many rows: what was timed was the last of them."""
    tables: dict[str, Callable[[], int]] = {
        "routes": lambda: len(host.ip("route", "show", "root", str(NETWORK))),
    }
    if backend == "vxlan":
        tables["neighbours"] = lambda: len(
            host.ip("neighbour", "show", "dev", "flannel.1", "nud", "permanent")
        )
        tables["FDB entries"] = lambda: len(host.bridge("fdb", "show", "dev", "flannel.1"))
    found = Counter({table: rows() for table, rows in tables.items()})
    if any(rows < count for rows in found.values()):
        raise LabError(f"{count} leases, but {dict(found)}")


def check_program(path: Path | None) -> None:
    """Raise LabError if it is none."""
    if path is not None and not (
        path.is_file() and os.access(path, os.X_OK) and shutil.which(path.resolve())
    ):
        raise LabError(f"BENCH_PEER={path} is not a program that can be executed")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
