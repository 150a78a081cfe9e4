"""The mailbox between the threads: the latest value of everything, not a queue of events."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from flanneld_py.addresses import IPNetwork
from flanneld_py.backends.base import Backend
from flanneld_py.core.admit import Peers
from flanneld_py.core.subnetchoice import is_compatible
from flanneld_py.daemon.counts import Counts
from flanneld_py.daemon.heartbeats import BEAT_EVERY, Heartbeats
from flanneld_py.model import Host, NetworkConfig, OwnLease, Snapshot
from flanneld_py.packetfilter import ChainKey
from flanneld_py.values import PartlyCompared

RUSHED = frozenset({"snapshot", "recalled"})
"""Levels by which a host joins: its packets wait for the rows, so the thread that makes these goes first."""
FIRST_PASS = 2.0
"""Seconds that the first pass gets before others go on."""


def boottime() -> float:
    """Seconds since boot, suspend included: unlike the wall clock nobody can turn it back."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_text(seconds: float) -> str:
    """A time since 1970, to the second."""
    try:
        return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return "an unknown time"


class Problem(PartlyCompared, frozen=True):
    """Something an operator should know, with what to do about it."""

    compared = 3

    code: str
    reason: str
    fix: str
    since: str = field(default_factory=utc_now)


class Network(PartlyCompared, frozen=True):
    """The config in force and the backend made from it."""

    compared = 3

    config: NetworkConfig
    backend: Backend
    former: tuple[IPNetwork, ...] = ()
    """Networks of configs that were in force before in this process: what lies inside them may be ours."""
    since: str = field(default_factory=utc_now)
    """When it was taken over."""


class RegistryState(PartlyCompared, frozen=True):
    compared = 3

    state: Literal["connecting", "in sync", "unreachable", "refused"] = "connecting"
    endpoint: str | None = None
    error: str | None = None
    since: str = field(default_factory=utc_now)
    began: float = field(default_factory=boottime)
    """`since` on the clock of `boottime`."""


class Recalled(Struct, frozen=True):
    """What an earlier run knew of the registry, which is in force until etcd answers."""

    own: OwnLease
    time: float
    """When etcd last said so, in seconds since 1970."""

    @property
    def of(self) -> str:
        """That time as text."""
        return utc_text(self.time)


class LeaseState(Struct, frozen=True):
    state: Literal["none", "waiting", "held", "conflict", "lost"] = "none"
    own: OwnLease | None = None
    problem: Problem | None = None
    ends: float | None = None
    """When etcd ends it unless it is renewed, by `boottime`; None: never, or it is not held."""
    recalled: bool = False
    """It is what an earlier run held: etcd has not been asked yet."""

    def renewed(self, now: float) -> LeaseState:
        """The same just after a renewal."""
        return replace(self, ends=now + self.own.ttl if self.own is not None and self.own.ttl else None)


class Report(Struct, frozen=True):
    """What the reconciler last did."""

    passes: int = 0
    in_sync: bool = False
    subnet_file_written: bool = False
    mtu: int | None = None
    devices: frozenset[str] = frozenset()
    """The devices that our rows hang on."""
    own_links: frozenset[str] = frozenset()
    """Of these, the ones we made."""
    offloads: Mapping[str, bool] = field(default_factory=dict)
    """Device → whether its checksum offload shall be on; the others are left as they are."""
    rules_by: str | None = None
    """The tool by which packet-filter rules are made; None: there are none of ours."""
    snapshot: Snapshot | None = None
    """By which the kernel was set up …"""
    peers: Peers = field(default_factory=Peers)
    """… with these peers."""
    held: int = 0
    """Of the peers, those whose record vanished together with many others …"""
    held_keys: frozenset[str] = frozenset()
    """… and which these are."""
    repaired: Mapping[str, int] = field(default_factory=dict)
    """Table → rows put right that somebody else had changed."""
    ops: Mapping[str, int] = field(default_factory=dict)
    """Verb → ops carried out since the start."""
    failed: tuple[tuple[str, str], ...] = ()
    """(op, error) of what could not be done and is retried."""
    failing_since: str = ""
    failing: Mapping[str, int] = field(default_factory=dict)
    """Table → rows that are not as they should be."""
    failing_from: float | None = None
    """Since when there have been such rows, or no pass at all succeeded, by `boottime`; None: all is well."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Table → rows of ours, as read back."""
    network: Network | None = None
    """By which the kernel was set up."""
    subnet_env: str = ""
    """What stands in the subnet file if nobody else has written there."""
    peers_left_out_since: str = ""
    problem: Problem | None = None


class DataPlane(Struct, frozen=True):
    """What forwards packets where the kernel does not."""

    device: str
    runs: str
    """native or python; empty: nothing does now."""
    why: str = ""
    """Why not native."""
    pid: int | None = None
    offloads: tuple[str, ...] = ()
    restarts: int = 0
    asked: str = ""
    """native, python or auto."""
    port: int | None = None
    source_check: str = ""


class Levels(Struct, frozen=True):
    """The latest of everything; each field has one thread that offers it."""

    network: Network | None = None  # registry-watch
    config_problem: Problem | None = None
    snapshot: Snapshot | None = None
    registry: RegistryState = field(default_factory=RegistryState)
    recalled: Recalled | None = None
    """Set while `network` and `snapshot` are those of an earlier run."""
    host: Host | None = None  # host-watch
    host_problem: Problem | None = None
    subnet_file_problem: Problem | None = None  # publisher
    overlap_problem: Problem | None = None  # publisher
    forwarding_problem: Problem | None = None  # publisher
    checksum_problem: Problem | None = None
    filter_problem: Problem | None = None  # filter-watch
    accept_in: tuple[ChainKey, ...] | None = ()
    """Of the chains that are to accept the overlay's traffic those that are there; None: not known yet."""
    data_plane: DataPlane | None = None  # data-plane
    """None: the kernel's own."""
    data_plane_problem: Problem | None = None
    fallback_problem: Problem | None = None
    """It runs, but not as it was asked to."""
    loss_problem: Problem | None = None
    """It runs, and loses packets."""
    memory_problem: Problem | None = None  # registry-memory
    kernel_changes: int = 0
    """Counts the changes somebody else made to what is ours."""
    inherited: tuple[IPNetwork, ...] = ()
    """The subnets that an earlier run left in subnet.env; known from the start."""
    lease: LeaseState = field(default_factory=LeaseState)  # lease-keeper
    report: Report = field(default_factory=Report)  # reconciler

    @property
    def fitting_host(self) -> Host | None:
        """The host, once its interface has been chosen for the families of the config in force."""
        if self.network is None or self.host is None:
            return None
        chosen = tuple(family for family, _ in self.host.external.addresses.items())
        return self.host if chosen == self.network.config.families else None

    @property
    def awaits_lease(self) -> bool:
        """Whether the config that was taken over demands another lease than the one that is held."""
        own = self.lease.own
        return (
            own is not None
            and self.network is not None
            and not is_compatible(own.record, self.network.config)
        )

    @property
    def network_in_force(self) -> Network | None:
        """The config that the kernel goes by: until a lease that the next one allows is held, that before."""
        return self.report.network or self.network if self.awaits_lease else self.network


class Inbox:
    """A condition over `Levels`: ten thousand offers while a reader is busy are one wake-up.

    Who waits here beats under the name of his thread, and so shows that he does not hang elsewhere.
    """

    def __init__(self, heartbeats: Heartbeats | None = None) -> None:
        self._heartbeats = heartbeats or Heartbeats()
        self.counts = Counts()
        lock = threading.Lock()
        self._condition = threading.Condition(lock)
        self._first = threading.Condition(lock)
        """Where the first reader waits, and whether he does …"""
        self._first_waits = False
        self._held_back = False
        """… and whether the others have yet to hear of something."""
        self._levels = Levels()
        self._set_up_by: float | None = None
        """When others wait for the first pass no more."""
        self._version = 0
        self._stopped = False
        self._alarms: dict[str, list[Callable[[], None]]] = defaultdict(list)

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def levels(self) -> Levels:
        return self._levels

    def offer(self, **levels: Any) -> None:
        """Replace some levels; the other threads see all of the change or none of it."""
        with self._condition:
            self._levels = replace(self._levels, **levels)
            self._wake(rush=levels.keys() <= RUSHED)
        for name in levels:
            for alarm in self._alarms.get(name, ()):
                alarm()

    def alarm(self, level: str, wake: Callable[[], None]) -> None:
        """Have `wake` called when a level was offered, for a thread that waits on something else.

        To be said before the threads are started.
        """
        self._alarms[level].append(wake)

    def kernel_changed(self) -> None:
        """Somebody else changed something of ours: read the kernel again."""
        with self._condition:
            self._levels = replace(self._levels, kernel_changes=self._levels.kernel_changes + 1)
            self._wake()

    def wait(self, seen: int, until: float | None = None, *, first: bool = False) -> tuple[int, Levels]:
        """Block until something is newer than `seen`, `until` (boottime) has passed, or `stop`.

        Of the RUSHED levels the others hear when the one reader who waits as the `first` waits again. Ten
        threads that wake together take turns with the interpreter, and he would be as slow as the last.
        """
        with self._condition:
            if first and self._held_back:
                self._held_back = False
                self._condition.notify_all()
            while self._version == seen and not self._stopped:
                left = None if until is None else until - boottime()
                if left is not None and left <= 0:
                    break
                self._first_waits |= first
                self._wait(left, self._first if first else self._condition)
                self._first_waits &= not first
            self.beat()
            return self._version, self._levels

    def pause(self, seconds: float) -> None:
        """Sleep, but not past `stop`."""
        end = boottime() + seconds
        with self._condition:
            while not self._stopped and (left := end - boottime()) > 0:
                self._wait(left, self._condition)

    def let_set_up(self) -> None:
        """Once the lease is held, sleep until the first pass is over, which needs the interpreter more.

        Not for long, and only then: that pass may hang or fail.
        """
        with self._condition:
            while self._levels.lease.state == "held" and not self._levels.report.passes and not self._stopped:
                if self._set_up_by is None:
                    self._set_up_by = boottime() + FIRST_PASS
                left = self._set_up_by - boottime()
                if left <= 0:
                    return
                self._wait(left, self._condition)

    def beat(self) -> None:
        """The calling thread turns; for one that waits on something else."""
        self._heartbeats.beat(threading.current_thread().name)

    def poke(self) -> None:
        """Wake all readers without a new value."""
        with self._condition:
            self._wake()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._wake()

    def _wait(self, seconds: float | None, condition: threading.Condition) -> None:
        self.beat()
        condition.wait(BEAT_EVERY if seconds is None else min(seconds, BEAT_EVERY))

    def _wake(self, *, rush: bool = False) -> None:
        self._version += 1
        self._first.notify()
        if rush and self._first_waits:
            self._held_back = True
        else:
            self._condition.notify_all()
