"""The thread that follows the registry: config and snapshot, by one list and one watch stream."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog
from msgspec.structs import replace

from flanneld_py.core.history import History
from flanneld_py.core.linger import nothing_stands
from flanneld_py.core.pace import Backoff, probe_seconds
from flanneld_py.core.records import CONFIG_KEY, SUBNETS_PREFIX, config_entry, fold, snapshot
from flanneld_py.daemon import garbage
from flanneld_py.daemon.configwatch import ConfigWatch
from flanneld_py.daemon.inbox import Inbox, Recalled, RegistryState, boottime
from flanneld_py.daemon.leftout import LeftOut
from flanneld_py.drivers.etcd import EtcdRegistry, WatchStream
from flanneld_py.drivers.etcdwatch import QUIET_SECONDS
from flanneld_py.errors import Compacted, Refused, RegistryError, Replaced, Unreachable
from flanneld_py.model import Changes, Entry, Listing, Record, Snapshot

LONGEST_BACKOFF = 2.0
"""Seconds between attempts to reach etcd: recovery is noticed within this, and etcd is not stormed."""
RELIST_AFTER = 600.0
"""A watch can lose events through defects of the server; a full list is the cure (seconds, ± 20 %)."""
RELIST_FOR_EACH = 0.36
"""Seconds for each record, once that is more: ten thousand daemons that list ten thousand records every ten
minutes would have etcd send 35 MB a second."""
SPREAD_FOR_EACH, MOST_SPREAD = 0.0004, 4.0
"""Seconds for each record, and at most, over which daemons spread that must all list again."""
DISTRUST_AT_MOST_EVERY = 30.0
"""Seconds: no contradiction between two answers of etcd, however lasting, makes us list all the time."""


class RegistryWatch:
    """Lists, watches, folds, and offers `snapshot`, `recalled` and `registry`."""

    def __init__(self, registry: EtcdRegistry, config: ConfigWatch, inbox: Inbox) -> None:
        self.may_recall: Callable[[], bool] = lambda: False
        """Whether what an earlier run knew will do, or may, until etcd answers."""
        self.last_run: Mapping[str, Record] | None = None
        """Records of others as an earlier run knew them, until the first listing."""
        self._registry = registry
        self._config = config
        self._inbox = inbox
        self._log = structlog.get_logger().bind(part="registry")
        self._backoff = Backoff(LONGEST_BACKOFF)
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        """Held while what is known is replaced: at the start another thread may."""
        self._stream: WatchStream | None = None
        self._doubt: threading.Timer | None = None
        """Tells that a new connection brings nothing."""
        self._snapshot = Snapshot(revision=0, cluster_id=0)
        self._history = History()
        self._must_list = True
        self._list_because = "start"
        self._replaced = False
        """The next listing is of another history than the snapshot."""
        self._distrusted_at = -DISTRUST_AT_MOST_EVERY
        self._bad_records = LeftOut(self._log, "bad_record", "bad_records")

    def run(self) -> None:
        """Until the inbox stops. No error takes a record away, and after the first listing none ends it.

        Raises:
            Refused: at the first contact: who wrote the flags or made the certificates is there to see it.
                Not on a host that has an earlier run's state to go by.
        """
        while not self._inbox.stopped:
            self._inbox.beat()
            try:
                resumed = not self._must_list
                if not resumed:
                    self._list()
                self._follow(resumed)
            except Compacted as error:
                self._log.info("registry_relist", reason=str(error))
                self._must_list = True
                self._list_because = "replaced" if isinstance(error, Replaced) else "compacted"
                self._replaced = self._replaced or isinstance(error, Replaced)
                self._backoff.reset()  # etcd has answered: what grew while it was away counts no more
                spread = min(MOST_SPREAD, SPREAD_FOR_EACH * len(self._snapshot.records))
                self._inbox.pause(self._backoff.delay(random.random()) + spread * random.random())  # noqa: S311 - jitter
            except RegistryError as error:
                self._lost(error)
                if isinstance(error, Refused) and self._is_fatal:
                    raise
                self._inbox.pause(self._backoff.delay(random.random()))  # noqa: S311 - jitter

    @property
    def _is_fatal(self) -> bool:
        """Whether a refusal is."""
        return not (self._snapshot.revision or self.may_recall() or self._inbox.stopped)

    def recall(self, known: Snapshot, config: Entry, recalled: Recalled) -> bool:
        """Go by what an earlier run knew, unless etcd has answered; whether so. Any thread may call."""
        with self._taking:
            if self._snapshot.revision:
                return False
            self._config.take(config)
            self._snapshot = known
            last = self._inbox.levels.registry
            if last.state == "connecting":
                last = RegistryState("unreachable", self._registry.endpoint, "it has not answered yet")
            self._log.warning(
                "running_on_state",
                of=recalled.of,
                lease=recalled.own.record.key,
                records=len(known.records),
                registry=last.state,
                error=last.error,
            )
            self._inbox.offer(snapshot=known, recalled=recalled, registry=last)
        return True

    def stop(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.cancel()

    def reconnect(self) -> None:
        """Go on by a new connection, as this one may lead nowhere. Any thread may call."""
        self._registry.reconnect()
        with self._lock:
            if self._stream is not None:
                self._stream.cancel()
            # The watch that would notice a silent etcd is gone, and a new one tries every endpoint first.
            self._cease_to_doubt()
            self._doubt = threading.Timer(QUIET_SECONDS, self._tell_silence)
            self._doubt.daemon = True
            with suppress(RuntimeError):  # no thread to be had
                self._doubt.start()

    def _cease_to_doubt(self) -> None:
        doubt, self._doubt = self._doubt, None
        if doubt is not None:
            doubt.cancel()

    def distrust(self) -> None:
        """List again at once, if not just done: etcd and what we know of it disagree. Any thread may call."""
        with self._lock:
            if boottime() < self._distrusted_at + DISTRUST_AT_MOST_EVERY:
                return
            self._distrusted_at = boottime()
            self._must_list, self._list_because = True, "distrust"
            if self._stream is not None:
                self._stream.cancel()
        self._log.info("registry_relist", reason="etcd and what we know of it disagree")

    def _list(self) -> None:
        # Not after the answer: who distrusts what we know while it is under way may not mean this answer.
        self._must_list = False
        try:
            listing = self._registry.list(first=self._inbox.levels.registry.state == "connecting")
        except RegistryError:
            self._must_list = True
            raise
        self._take_listing(listing)

    def _follow(self, resumed: bool) -> None:
        """Fold events until the stream ends or a full list is due."""
        self._inbox.beat()
        known = self._snapshot
        stream = self._registry.watch(
            known.revision,
            known.cluster_id,
            resumed=resumed,
            on_silence=self._tell_silence,
            probe_seconds=lambda: probe_seconds(len(self._snapshot.records)),
        )
        with self._lock:
            self._stream = stream
        after = max(RELIST_AFTER, RELIST_FOR_EACH * len(known.records))
        relist_at = boottime() + after * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        try:
            if resumed:
                self._check_history(known.revision)
            if self._must_list or self._inbox.stopped:
                return
            self._offer_state(RegistryState("in sync", self._registry.endpoint))
            for changes in stream:
                self._inbox.beat()
                self._found()
                # Last, as the thread that it wakes waits for the interpreter until this one sleeps.
                self._take_changes(changes)
                if self._inbox.stopped:
                    return
                if boottime() >= relist_at:
                    self._must_list, self._list_because = True, "timer"
                    return
            if stream.outdated:
                self._log.info("registry_reconnect", reason="other TLS files")
        finally:
            stream.cancel()

    def _check_history(self, revision: int) -> None:
        """With the watch open: should etcd be replaced from now on, the watch will break.

        Raises:
            Compacted: list again; Replaced: and it is another history.
        """
        expected, found = self._history.resume(), self._registry.fingerprint(revision)
        if found != expected:
            raise Replaced(
                f"etcd {self._registry.endpoint}: the registry was replaced or restored: at revision "
                f"{revision} expected {expected}, found {found}: list again"
            )

    def _take_listing(self, listing: Listing) -> None:
        garbage.expect(len(listing.entries))
        self._inbox.counts.add("registry_resyncs", self._list_because)
        self._history.begin(listing)
        with self._taking:
            self._config.take(config_entry(listing))
            fresh = snapshot(listing, self._snapshot, replaced=self._replaced, last_run=self.last_run)
            self.last_run = None
            if self._inbox.levels.recalled is not None and self._is_overtaken(fresh):
                fresh = snapshot(listing, self._snapshot, replaced=True)
            self._take_snapshot(fresh)
        self._replaced = False
        self._found()

    def _is_overtaken(self, fresh: Snapshot) -> bool:
        """Whether etcd holds nothing of what the last run knew."""
        created = {key: record.create_revision for key, record in self._snapshot.records.items()}
        return nothing_stands(created, fresh.records)

    def _take_changes(self, changes: Changes) -> None:
        self._history.extend(changes)
        for change in changes.changes:
            self._inbox.counts.add("events", "delete" if change.entry is None else "put")
            if change.key == CONFIG_KEY:
                self._config.take(change.entry)
        fresh = fold(self._snapshot, changes)
        if any(change.key.startswith(SUBNETS_PREFIX) for change in changes.changes):
            self._take_snapshot(fresh)
        else:
            # Only the revision to resume from has moved on: nobody need wake up for it.
            self._snapshot = fresh
        self._bad_records.tell_rest()

    def _take_snapshot(self, fresh: Snapshot) -> None:
        self._bad_records.tell(fresh.bad, kept=fresh.records)
        self._snapshot = fresh
        self._inbox.offer(snapshot=fresh, recalled=None)
        self._config.review()

    def _found(self) -> None:
        self._backoff.reset()
        state, endpoint = self._inbox.levels.registry, self._registry.endpoint
        if (state.state, state.endpoint) != ("in sync", endpoint):
            state = RegistryState("in sync", endpoint)
        self._offer_state(state)

    def _lost(self, error: RegistryError) -> None:
        if self._inbox.stopped:
            return  # the connection was closed by us
        refused = isinstance(error, Refused)
        self._offer_state(
            RegistryState("refused" if refused else "unreachable", self._registry.endpoint, str(error))
        )

    def _tell_silence(self) -> None:
        """The watch goes on: what is late may come, and then all is well again. A thread of gRPC's calls."""
        endpoint = self._registry.endpoint
        self._lost(Unreachable(f"etcd {endpoint}: it has not answered for {QUIET_SECONDS:g} s"))

    def _offer_state(self, fresh: RegistryState) -> None:
        """Offer and log changes only: an outage of a day is one line, not one per attempt."""
        last = self._inbox.levels.registry
        if fresh.state == "in sync":
            self._inbox.counts.synced()
            self._cease_to_doubt()
        if fresh == last:
            return
        if fresh.state == last.state:
            fresh = replace(fresh, since=last.since, began=last.began)
        elif fresh.state == "in sync":
            self._log.info("registry_in_sync", endpoint=fresh.endpoint)
        else:
            self._log.warning("registry_" + fresh.state, endpoint=fresh.endpoint, error=fresh.error)
        self._inbox.offer(registry=fresh)
