"""One watch on one gRPC stream. Part of the etcd driver."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from flanneld_py.drivers import etcdrpc
from flanneld_py.drivers.etcdanswers import (
    AttemptError,
    TokenRefused,
    entry_of,
    explain,
    range_end,
    relative_key,
)
from flanneld_py.errors import Compacted, Replaced, Unreachable
from flanneld_py.model import Change, Changes

CREATE_SECONDS = 3.0
"""Until etcd has confirmed the watch."""
PROBE_SECONDS = 60.0
"""A watch is asked for its progress this often, give or take a tenth, or as its user says …"""
QUIET_SECONDS = 2.0
"""… it is told when nothing at all has come within this …"""
ANSWER_SECONDS = 5.0
"""… and the watch is dead after this. Not sooner: etcd may be slow, and connecting anew makes it slower."""
OVERRUN_SECONDS = 1.0
"""Whose own waiting took so much longer was stopped or starved, and cannot judge others."""
LOOK_SECONDS = 5.0
"""A watch looks this often whether its connection is still made as it should be."""


class WatchStream(Iterator[Changes]):
    """A watch opened by `EtcdRegistry.watch`. One thread iterates; any thread may cancel, and one must.

    Each item's `revision` is safe to resume after. That is the revision of the last event delivered, or of a
    progress notice that etcd sent in order with the events. It is not the header's: a watch that catches up
    over more than 1,000 revisions gets them in parts, all under the newest revision. Nor is it that of a
    progress answer we asked for, which may overtake events (etcd-io/etcd#15220), or of one fragment of a
    response. Those repeat the revision before them.
    """

    def __init__(
        self,
        channel: Any,
        *,
        endpoint: str,
        root: bytes,
        revision: int,
        resumed: bool,
        metadata: tuple[tuple[str, str], ...],
        on_end: Callable[[], None],
        on_failure: Callable[[], None],
        is_outdated: Callable[[], bool],
        on_silence: Callable[[], None],
        probe_seconds: Callable[[], float] | None,
    ) -> None:
        """Send the request. `on_end` is called once; `on_failure` before it when the endpoint is to blame.

        The iteration ends when `is_outdated` says that a new connection would be another. `on_silence` is
        called, by a thread of gRPC's, when etcd has not answered for QUIET_SECONDS.
        """
        self._endpoint = endpoint
        self._root = root
        self._known = self._revision = revision
        # When compaction stops right at the first revision asked for, etcd forgets a delete in that one
        # (etcd-io/etcd#18089), so what we know is asked for once more and passed over. Not after a listing: a
        # watch from the past is served a tenth of a second later.
        self._start = revision if resumed else revision + 1
        self._on_end = on_end
        self._on_failure = on_failure
        self._is_outdated = is_outdated
        self._on_silence = on_silence
        usual_seconds = PROBE_SECONDS
        self._probe_seconds = probe_seconds or (lambda: usual_seconds)
        self._ending = threading.Lock()
        self._watch_id = 0
        self._cancelled = False
        self.outdated = False
        """Whether the iteration ended because a new connection would be another."""
        self._silent = False
        self._waiting_since: float | None = time.monotonic()
        self._over = threading.Event()
        self._call = etcdrpc.WatchStub(channel).Watch(self._requests(), metadata=metadata)

    def __next__(self) -> Changes:
        """The next changes, perhaps none: a sign of life.

        Raises:
            Compacted: events are missing, list again.
            RegistryError: the stream is dead, watch again.
        """
        try:
            return self._changes(self._read())
        except AttemptError as failure:
            if failure.elsewhere:
                # Broken TLS, too: this connection was good, so nothing has been refused yet.
                failure.kind = Unreachable
                self._on_failure()
            self._end()
            raise failure.at(self._endpoint) from None

    def cancel(self) -> None:
        """End the iteration, also while another thread waits in it."""
        self._cancelled = True
        self._call.cancel()
        self._end()

    def await_created(self, cluster_id: int) -> None:
        """Wait until etcd has taken the watch over. Raises AttemptError, with the stream ended."""
        try:
            reply = self._read()
            self._watch_id = reply.watch_id
            self._check_history(reply.header, cluster_id)
        except BaseException:
            self.cancel()
            raise

    def _check_history(self, header: Any, cluster_id: int) -> None:
        """A wiped or restored etcd would watch on as if nothing were missing."""
        if header.cluster_id != cluster_id or header.revision < self._revision:
            raise AttemptError(Replaced, "the registry was replaced or restored: list again")

    def _end(self) -> None:
        self._over.set()
        if self._ending.acquire(blocking=False):
            self._on_end()

    def _requests(self) -> Iterator[Any]:
        """What we say on the stream. Run by a thread of gRPC's, it also listens for silence from there."""
        # While a watch is created somebody waits for it, and is told at the end.
        quiet_seconds, answer_seconds = CREATE_SECONDS, CREATE_SECONDS
        later_quiet_seconds, later_answer_seconds = min(QUIET_SECONDS, ANSWER_SECONDS), ANSWER_SECONDS
        create = etcdrpc.WatchCreateRequest(
            key=self._root,
            range_end=range_end(self._root),
            start_revision=self._start,
            progress_notify=True,
            fragment=True,
        )
        request = etcdrpc.WatchRequest(create_request=create)
        while True:
            asked = time.monotonic()
            yield request
            if self._over.wait(quiet_seconds):
                return
            if self._is_unanswered(asked):
                overran = time.monotonic() - asked > quiet_seconds + OVERRUN_SECONDS
                if quiet_seconds < answer_seconds and not overran:
                    self._on_silence()
                if self._over.wait(answer_seconds - quiet_seconds):
                    return
                if self._is_unanswered(asked):
                    self._silent = True
                    self._call.cancel()
                    return
            pause = self._probe_seconds() * random.uniform(0.9, 1.1)  # noqa: S311 - only spreads load
            if self._pause(pause - (time.monotonic() - asked)):
                return
            request = etcdrpc.WatchRequest(progress_request=etcdrpc.WatchProgressRequest())
            quiet_seconds, answer_seconds = later_quiet_seconds, later_answer_seconds

    def _is_unanswered(self, asked: float) -> bool:
        """Silence counts only while somebody listens; unread messages wait in gRPC."""
        waiting_since = self._waiting_since
        return waiting_since is not None and waiting_since <= asked

    def _pause(self, seconds: float) -> bool:
        """Whether the watch has come to its end meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._over.wait(min(left, LOOK_SECONDS)):
                return True
            if self._is_outdated():
                self.outdated = self._cancelled = True
                self._call.cancel()
                return True
        return False

    def _read(self) -> Any:
        """The next response that is no refusal; StopIteration after `cancel`."""
        self._waiting_since = time.monotonic()
        try:
            reply = next(self._call)
        except (grpc.RpcError, StopIteration) as error:
            if self._cancelled:
                raise StopIteration from None
            if self._silent:
                raise AttemptError(Unreachable, "the watch has fallen silent") from None
            if isinstance(error, StopIteration):
                raise AttemptError(Unreachable, "the watch was ended") from None
            raise explain(error) from None
        finally:
            self._waiting_since = None
        if not reply.canceled:
            return reply
        if reply.compact_revision:
            text = f"revision {self._start} is compacted, up to {reply.compact_revision}: list again"
            raise AttemptError(Compacted, text)
        # etcd 3.4 calls an expired token a lack of permission, too.
        reason = reply.cancel_reason.replace("etcdserver: ", "") or "the watch was cancelled"
        denied = "permission" in reason or "token" in reason
        raise AttemptError(TokenRefused if denied else Unreachable, reason)

    def _changes(self, reply: Any) -> Changes:
        changes = tuple(
            Change(
                relative_key(event.kv.key, self._root),
                None if event.type == etcdrpc.Event.DELETE else entry_of(event.kv, self._root),
            )
            for event in reply.events
            if event.kv.mod_revision > self._known
        )
        if reply.events and not reply.fragment:
            self._revision = reply.events[-1].kv.mod_revision
        elif not reply.events and reply.watch_id == self._watch_id:
            self._revision = max(self._revision, reply.header.revision)
        return Changes(self._revision, changes)
