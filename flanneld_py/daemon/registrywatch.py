"""The thread that follows the registry: config and snapshot, by one list and one watch stream."""

from __future__ import annotations

import random
import shlex
import threading
from dataclasses import replace
from typing import Any

import structlog

from flanneld_py.backends import backend_of
from flanneld_py.core.config import parse_config
from flanneld_py.core.history import History
from flanneld_py.core.pace import Backoff
from flanneld_py.core.prefix import key_root
from flanneld_py.core.records import CONFIG_KEY, SUBNETS_PREFIX, config_entry, fold, snapshot
from flanneld_py.daemon.inbox import Inbox, Network, Problem, RegistryState, boottime
from flanneld_py.drivers.etcd import EtcdRegistry, WatchStream
from flanneld_py.errors import Compacted, ConfigError, Refused, RegistryError, Replaced
from flanneld_py.model import Changes, Entry, Listing, Snapshot

LONGEST_BACKOFF = 2.0
"""Seconds between attempts to reach etcd: recovery is noticed within this, and etcd is not stormed."""
RELIST_AFTER = 600.0
"""A watch can lose events through defects of the server; a full list is the cure (seconds, ± 20 %)."""
DISTRUST_AT_MOST_EVERY = 30.0
"""Seconds: no contradiction between two answers of etcd, however lasting, makes us list all the time."""
BAD_SHOWN, BAD_PERIOD = 10, 60.0
"""Bad records told one by one in so many seconds; of further ones the number has to do."""
EXAMPLE_CONFIG = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'


class RegistryWatch:
    """Lists, watches, folds, and offers `network`, `snapshot` and `registry`."""

    def __init__(self, registry: EtcdRegistry, prefix: str, inbox: Inbox) -> None:
        self._registry = registry
        self._inbox = inbox
        self._log = structlog.get_logger().bind(part="registry")
        self._backoff = Backoff(LONGEST_BACKOFF)
        self._lock = threading.Lock()
        self._stream: WatchStream | None = None
        self._snapshot = Snapshot(revision=0, cluster_id=0)
        self._history = History()
        self._must_list = True
        self._replaced = False
        """The next listing is of another history than the snapshot."""
        self._distrusted_at = -DISTRUST_AT_MOST_EVERY
        self._bad_records = _BadRecords(self._log)
        self._config_key = f"{key_root(prefix)}{CONFIG_KEY}"
        self._config_text: bytes | None = None
        self._in_force = ""
        """The text of the config in force."""

    def run(self) -> None:
        """Until the inbox stops. No error ends it, and none takes a record away."""
        while not self._inbox.stopped:
            try:
                resumed = not self._must_list
                if not resumed:
                    self._list()
                self._follow(resumed)
            except Compacted as error:
                self._log.info("registry_relist", reason=str(error))
                self._must_list = True
                self._replaced = self._replaced or isinstance(error, Replaced)
                self._backoff.reset()  # etcd has answered: what grew while it was away counts no more
                self._inbox.pause(self._backoff.delay(random.random()))  # noqa: S311 - jitter
            except RegistryError as error:
                self._lost(error)
                self._inbox.pause(self._backoff.delay(random.random()))  # noqa: S311 - jitter

    def stop(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.cancel()

    def distrust(self) -> None:
        """List again at once, if not just done: etcd and what we know of it disagree. Any thread may call."""
        with self._lock:
            if boottime() < self._distrusted_at + DISTRUST_AT_MOST_EVERY:
                return
            self._distrusted_at = boottime()
            self._must_list = True
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
        known = self._snapshot
        stream = self._registry.watch(known.revision, known.cluster_id, resumed=resumed)
        with self._lock:
            self._stream = stream
        relist_at = boottime() + RELIST_AFTER * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        try:
            if resumed:
                self._check_history(known.revision)
            if self._must_list or self._inbox.stopped:
                return
            self._offer_state(RegistryState("in sync", self._registry.endpoint))
            for changes in stream:
                self._found()
                self._take_changes(changes)
                if self._inbox.stopped:
                    return
                if boottime() >= relist_at:
                    self._must_list = True
                    return
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
        self._history.begin(listing)
        self._take_config(config_entry(listing))
        self._take_snapshot(snapshot(listing, self._snapshot, replaced=self._replaced))
        self._replaced = False
        self._found()

    def _take_changes(self, changes: Changes) -> None:
        self._history.extend(changes)
        for change in changes.changes:
            if change.key == CONFIG_KEY:
                self._take_config(change.entry)
        fresh = fold(self._snapshot, changes)
        if any(change.key.startswith(SUBNETS_PREFIX) for change in changes.changes):
            self._take_snapshot(fresh)
        else:
            # Only the revision to resume from has moved on: nobody need wake up for it.
            self._snapshot = fresh
        self._bad_records.tell_rest()

    def _take_snapshot(self, fresh: Snapshot) -> None:
        self._bad_records.tell(self._snapshot, fresh)
        self._snapshot = fresh
        self._inbox.offer(snapshot=fresh)

    def _take_config(self, entry: Entry | None) -> None:
        text = entry.value if entry else None
        problem = self._inbox.levels.config_problem
        if text == self._config_text and (problem or self._inbox.levels.network):
            return
        self._config_text = text
        in_force = self._inbox.levels.network
        if text is None:
            self._report_config(self._missing())
            return
        try:
            config = parse_config(text)
            network = Network(config, backend_of(config))
        except ConfigError as error:
            what = "the config in force stays" if in_force else "nothing is set up until it is mended"
            self._report_config(
                Problem("config-invalid", f"{error}; {what}", f"correct {self._config_key} in etcd")
            )
            return
        if in_force is not None and in_force.config != config:
            self._report_config(
                Problem("config-pending", "the network config was changed", "restart the daemon to apply it")
            )
            return
        if config.unknown_keys:
            self._log.warning("config_unknown_keys", keys=list(config.unknown_keys))
        if in_force is None:
            self._in_force = text.decode()
            self._log.info("config", networks=[str(n) for n in config.networks], backend=network.backend.type)
        elif problem is not None:
            self._log.info("config_well", reason="the config in force is stored again")
        self._inbox.offer(network=in_force or network, config_problem=None)

    def _missing(self) -> Problem:
        where, config = self._config_key, shlex.quote(self._in_force or EXAMPLE_CONFIG)
        put = f"ETCDCTL_API=3 etcdctl --endpoints={self._registry.endpoint} put {where} {config}"
        reason = (
            f"no network config at {where}; keys written through etcd's old v2 API (etcdctl set) are not seen"
        )
        if self._in_force:
            reason = f"the network config at {where} was deleted; the config in force stays"
        return Problem("config-missing", reason, put)

    def _report_config(self, problem: Problem) -> None:
        if problem != self._inbox.levels.config_problem:
            self._log.warning(problem.code.replace("-", "_"), reason=problem.reason, fix=problem.fix)
            self._inbox.offer(config_problem=problem)

    def _found(self) -> None:
        self._backoff.reset()
        self._offer_state(RegistryState("in sync", self._registry.endpoint))

    def _lost(self, error: RegistryError) -> None:
        if self._inbox.stopped:
            return  # the connection was closed by us
        refused = isinstance(error, Refused)
        self._offer_state(
            RegistryState("refused" if refused else "unreachable", self._registry.endpoint, str(error))
        )

    def _offer_state(self, fresh: RegistryState) -> None:
        """Offer and log changes only: an outage of a day is one line, not one per attempt."""
        last = self._inbox.levels.registry
        if fresh == last:
            return
        if fresh.state == last.state:
            fresh = replace(fresh, since=last.since)
        elif fresh.state == "in sync":
            self._log.info("registry_in_sync", endpoint=fresh.endpoint)
        else:
            self._log.warning("registry_" + fresh.state, endpoint=fresh.endpoint, error=fresh.error)
        self._inbox.offer(registry=fresh)


class _BadRecords:
    """Logs what has become bad: some of it record by record, and how many more there are."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._shown = self._untold = 0
        self._began = self._counted_at = -BAD_PERIOD

    def tell(self, last: Snapshot, fresh: Snapshot) -> None:
        """What is bad in `fresh` and was not, or for another reason, in `last`."""
        news = [key for key, reason in fresh.bad.items() if last.bad.get(key) != reason]
        if not news:
            return
        if boottime() >= self._began + BAD_PERIOD:
            self._began, self._shown = boottime(), 0
        shown = news[: BAD_SHOWN - self._shown]
        for key in shown:
            self._log.warning("bad_record", key=key, reason=fresh.bad[key], kept=key in fresh.records)
        self._shown += len(shown)
        self._untold += len(news) - len(shown)
        self.tell_rest()

    def tell_rest(self) -> None:
        """How many have not been shown: at once, then not again for a while."""
        if self._untold and boottime() >= self._counted_at + BAD_PERIOD:
            self._log.warning("bad_records", count=self._untold, see="peers.bad of the status")
            self._untold, self._counted_at = 0, boottime()
