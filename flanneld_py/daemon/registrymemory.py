"""The thread that keeps for the next run what is known of the registry, and recalls what the last one kept.

A disk that hangs delays nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from flanneld_py.addresses import Subnets
from flanneld_py.backends import backend_of
from flanneld_py.core.config import parse_config
from flanneld_py.core.records import CONFIG_KEY
from flanneld_py.core.registrycache import (
    Cached,
    DamagedError,
    Known,
    Origin,
    digest_of,
    render,
    render_end,
)
from flanneld_py.core.subnetchoice import is_compatible
from flanneld_py.daemon.inbox import Inbox, Levels, Problem, Recalled, boottime
from flanneld_py.daemon.leaseground import stands
from flanneld_py.daemon.recall import is_machine_of
from flanneld_py.daemon.statedir import put_aside
from flanneld_py.drivers.files import write_atomically
from flanneld_py.drivers.kernel import read_host
from flanneld_py.errors import ConfigError, KernelError
from flanneld_py.model import Entry, OwnLease, Record, Snapshot

RECALL_AFTER = 1.0
"""Seconds that etcd has to answer at the start before the last run's state is gone by; less when it fails."""
LOOK_AGAIN, ARRIVES_WITHIN = 0.5, 10.0
"""Seconds: the interface by which this machine is known may still have to come after another one."""
WRITE_EVERY, SHARE = 5.0, 0.01
"""Seconds between two writings at least, and the share of the time that they may take: of ten thousand
records there are megabytes, and some record changes all the time."""
AT_A_TIME = 64
"""Lines, which take half a millisecond."""
FIRST_AFTER = 1.0
"""Seconds from the start, which has enough to do."""
TIME_TOLD_EVERY = 3600.0
"""Seconds after which the file is written again although nothing has changed, for the time that it tells."""
FIX = "make room, or make it writable: it is tried again by itself"


class RegistryMemory:
    """Has `network`, `snapshot` and `recalled` offered at a start without etcd; offers `memory_problem`."""

    def __init__(
        self,
        inbox: Inbox,
        path: Path,
        cached: Cached | None,
        recall: Callable[[Snapshot, Entry, Recalled], bool],
        config_in_force: Callable[[], str | None],
        leased: Subnets,
    ) -> None:
        """`cached`: what stands in the file at `path`; `recall` gives it to whoever follows the registry.

        `leased`: what was leased last, as the lease's own file says, which is written at once.
        """
        self._inbox = inbox
        self._path = path
        self._cached = cached
        self._recall = recall
        self._config_in_force = config_in_force
        self._leased = leased
        self._log = structlog.get_logger().bind(part="registry")
        self._known: Known | None = None
        """What was last looked at for writing."""
        self._content = cached.content if cached else ""
        """Digest of what the file holds."""
        self._own = cached.own if cached else ""
        """The key of the lease that it tells."""
        self._told_at = cached.time if cached else 0.0
        """The time that it tells."""
        self._first_at = boottime() + FIRST_AFTER
        self._arrive_until = boottime() + ARRIVES_WITHIN

    @property
    def may_recall(self) -> bool:
        """Whether there is something to begin with, as far as known. Any thread may call."""
        return self._cached is not None and bool(self._cached.own)

    def run(self) -> None:
        """Until the inbox stops, and once more then."""
        self._begin()
        seen, due = -1, self._first_at
        while not self._inbox.stopped:
            seen, levels = self._inbox.wait(seen, self._wake_at(due))
            if boottime() < due and not self._is_renumbered(levels):
                continue
            began = boottime()
            if self._save(levels):
                due = boottime() + max(WRITE_EVERY, (boottime() - began) / SHARE)
        self._save(self._inbox.levels)

    def _is_renumbered(self, levels: Levels) -> bool:
        """Whether the lease is another than in the file, which is not to be gone by any more."""
        own = levels.lease.own
        return boottime() >= self._first_at and own is not None and own.record.key != self._own

    def _wake_at(self, due: float) -> float | None:
        if boottime() < due:
            return due
        if self._inbox.levels.memory_problem is not None:
            return boottime() + WRITE_EVERY
        return None

    # --- the start

    def _begin(self) -> None:
        """Wait for etcd's first answer or failure, then see what there is to go by without it."""
        seen, levels, until = -1, self._inbox.levels, boottime() + RECALL_AFTER
        while self.may_recall and levels.snapshot is None and not self._inbox.stopped:
            seen, levels = self._inbox.wait(seen, until)
            failed = levels.registry.state in ("unreachable", "refused")
            if levels.snapshot is None and (failed or boottime() >= until):
                self._try_recall(levels)
                self._inbox.pause(0 if self._inbox.levels.snapshot else LOOK_AGAIN)
        self._cached = None

    def _try_recall(self, levels: Levels) -> None:
        cached = self._cached
        if cached is None:
            return
        try:
            facts = read_host()
        except KernelError:
            return  # looked at again
        try:
            snapshot = cached.snapshot()
            own, entry = snapshot.records[cached.own], Entry(CONFIG_KEY, cached.config.encode())
            allowed = _is_allowed(own, entry)
        except (DamagedError, ConfigError) as error:
            self._put_aside(str(error))
            return
        if self._leased.values() and self._leased != own.subnets:
            leased = " and ".join(map(str, self._leased.values()))
            self._put_aside(f"is of lease {own.key}, and {leased} was leased since")
        elif not allowed:
            self._put_aside(f"has a network config that does not allow its lease {own.key}")
        elif is_machine_of(cached.origin.mac, own, facts):
            self._recall(snapshot, entry, Recalled(OwnLease(own, cached.ttl), cached.time))
        elif levels.host is not None and boottime() >= self._arrive_until:
            self._put_aside(f"was written on another machine, with the address {cached.origin.mac}")

    def _put_aside(self, reason: str) -> None:
        put_aside(self._path, reason)
        self._cached, self._content = None, ""

    # --- writing

    def _save(self, levels: Levels) -> bool:
        """Whether the file was to be written, also if that failed: the next try has to wait as long."""
        known, failed = self._known_now(levels), levels.memory_problem is not None
        if known is None:
            return False
        now = self._inbox.counts.last_sync or 0.0
        in_time = 0 <= now - self._told_at < TIME_TOLD_EVERY
        if in_time and not failed and self._known is not None and known.same(self._known):
            return False
        self._known, self._own = known, known.own
        text = _rendered(known)
        content = digest_of(text)
        if in_time and not failed and content == self._content:
            return False
        self._write(text + render_end(content, known.snapshot.revision, now), content, now)
        return True

    def _known_now(self, levels: Levels) -> Known | None:
        """What is worth keeping: what etcd says, and as the kernel was set up by it."""
        report, own, host = levels.report, levels.lease.own, levels.host
        snapshot, config = report.snapshot, self._config_in_force()
        if levels.recalled is not None or snapshot is None or host is None or config is None:
            return None
        if levels.awaits_lease:
            return None  # the kernel goes by the config before
        holds = own is not None and not levels.lease.recalled and stands(levels.lease, snapshot)
        if own and not holds and own.record.key not in snapshot.records and levels.lease.state != "conflict":
            return None  # it is claimed again; until then a start without etcd does best with what it was
        return Known(
            Origin(host.prefix, host.node_id, host.external.mac),
            config,
            own.record.key if own and holds else "",
            own.ttl if own and holds else 0,
            snapshot,
            report.peers.accepted,
            report.held_keys,
        )

    def _write(self, text: str, content: str, now: float) -> None:
        known = self._inbox.levels.memory_problem
        try:
            write_atomically(self._path, text, 0o600)
        except OSError as error:
            reason = (
                f"{self._path}: {error.strerror}: what is known of the registry is not kept, so a reboot "
                "without etcd finds an old state, or none"
            )
            if known is None or known.reason != reason:
                self._log.warning("registry_not_saved", path=str(self._path), error=str(error))
                self._inbox.offer(memory_problem=Problem("state-not-saved", reason, FIX))
            return
        self._content, self._told_at = content, now
        if known is not None:
            self._log.info("registry_saved", path=str(self._path))
            self._inbox.offer(memory_problem=None)


def _rendered(known: Known) -> str:
    """The lines, made so that nobody waits long for his turn."""
    lines = []
    for number, line in enumerate(render(known)):
        lines.append(line)
        if number % AT_A_TIME == 0:
            time.sleep(0)
    return "".join(lines)


def _is_allowed(own: Record, entry: Entry) -> bool:
    """Whether the config allows our lease.

    Raises:
        ConfigError: it is none that this version can carry out.
    """
    config = parse_config(entry.value)
    backend_of(config)
    return is_compatible(own, config)
