"""etcd as the registry: list, watch, guarded writes, leases; with failover, and an end to every call.

Used of the package etcd3: channels with TLS, and the stubs. Not used: its watcher (spins while etcd is down
and loses the watch at the first error), its authentication (never renews a token), its keep-alive and its
pages (arguments accepted and ignored).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from flanneld_py.core.prefix import key_root
from flanneld_py.drivers import etcdrpc  # silences gRPC, so it comes before grpc

# isort: split

import grpc
from grpc import _common

from flanneld_py.drivers import etcdtxn
from flanneld_py.drivers.etcdanswers import (
    CA,
    CERTIFICATE,
    USER,
    AttemptError,
    LeaseExists,
    LeaseTime,
    TokenRefused,
    TooLarge,
    entry_of,
    explain,
    joined,
    range_end,
)
from flanneld_py.drivers.etcdlink import Link
from flanneld_py.drivers.etcdsettings import EtcdSettings, check, current_password
from flanneld_py.drivers.etcdwatch import WatchStream
from flanneld_py.errors import Compacted, LeaseGone, Refused, Unreachable, UsageError
from flanneld_py.model import Entry, Fingerprint, Listing

__all__ = ["EtcdRegistry", "EtcdSettings", "LeaseTime", "WatchStream", "Written"]

T = TypeVar("T")

ATTEMPT_SECONDS = 3.0
"""Deadline of one request at one endpoint, and of connecting to it."""
LIST_SECONDS = 10.0
"""The same for a page of the listing: several MB, perhaps over a slow line."""
TOTAL_SECONDS = 15.0
"""After this no further endpoint is tried for the same call."""
PAGE_KEYS = 20_000
# gRPC wakes each waiting thread ten times a second, so that signals are seen. Only our main thread sees any.
_common.MAXIMUM_WAIT_TIMEOUT = 10.0

_LEADER_ONLY = ("hasleader", "true")
"""Metadata by which an etcd member that has lost the leader refuses at once, and ends watches."""


class Written(Struct, frozen=True):
    """What became of a write. When its guard failed, `entry` is what stood there (None: nothing)."""

    ok: bool
    revision: int
    """Where the key was written, or the guard was checked."""
    entry: Entry | None = None


class EtcdRegistry:
    """The keys below one prefix. Any thread may call; keys are relative to the prefix.

    A call that an endpoint leaves unanswered is made at the others, then once more at the first on a new
    connection; every request is therefore one that may arrive twice. Every method raises:

        Unreachable: no endpoint answered, each within ATTEMPT_SECONDS, all within little over TOTAL_SECONDS.
        Refused: wrong password, no permission, or TLS verification failed at every endpoint.
    """

    def __init__(
        self, settings: EtcdSettings, timed: Callable[[float, str], object] = lambda _seconds, _call: None
    ) -> None:
        """Check the settings; nothing is sent yet.

        Args:
            settings: where and how.
            timed: told after each call how many seconds it took, and its name in etcd (`Range`).

        Raises:
            UsageError: a setting cannot be meant; the text names its flag.
        """
        self._settings = settings
        self._timed = timed
        self._endpoints = check(settings)
        self._given = {
            CA: settings.told_ca,
            CERTIFICATE: settings.told_certificate,
            USER: settings.told_user,
        }
        self._root = key_root(settings.prefix).encode(errors="surrogateescape")
        self._lock = threading.Lock()
        self._index = 0
        self._link: Link | None = None
        self._closed = False
        self._token: str | None = None
        """None: to be asked for. Empty: etcd has authentication switched off."""

    @property
    def endpoint(self) -> str:
        """The endpoint in use, or the next to be tried."""
        return str(self._endpoints[self._index])

    def put_line(self, key: str, value: str) -> str:
        """The line for a shell that stores a value under a whole key, for advice."""
        return self._settings.put_line(self.endpoint, key, value)

    def config_lines(self, key: str, value: str) -> str:
        """The same for the network config, and behind it the line for flannelctl."""
        return f"{self.put_line(key, value)}  # or: {self._settings.config_set_line(value)}"

    def list(self, *, first: bool = False) -> Listing:
        """All keys at one revision; one request for up to PAGE_KEYS of them.

        `first`: no connection has been there that might have broken since, and whoever starts the daemon is
        to be told soon what is wrong. Each endpoint is tried once, for ATTEMPT_SECONDS.
        """
        try:
            return self._list(first)
        except Compacted:  # between two pages
            return self._list(first)

    def fingerprint(self, revision: int) -> Fingerprint:
        """What stood below the prefix at a revision: one request, answered in a few bytes.

        Raises:
            Compacted: list again: the revision is gone, or (Replaced) has not come about.
        """
        request = etcdrpc.RangeRequest(
            key=self._root,
            range_end=range_end(self._root),
            revision=revision,
            limit=1,
            sort_order=etcdrpc.RangeRequest.DESCEND,
            sort_target=etcdrpc.RangeRequest.MOD,
            keys_only=True,
        )
        reply = self._call(lambda client: client.kvstub.Range, request, LIST_SECONDS)
        return Fingerprint(reply.count, reply.kvs[0].mod_revision if reply.kvs else 0)

    def watch(
        self,
        revision: int,
        cluster_id: int,
        *,
        resumed: bool = False,
        on_silence: Callable[[], None] = lambda: None,
        probe_seconds: Callable[[], float] | None = None,
    ) -> WatchStream:
        """Follow all keys from just after a revision.

        Args:
            revision: where a listing or, when `resumed`, an earlier watch ended.
            cluster_id: of the etcd that gave it.
            resumed: time may have gone by since, in which etcd may have compacted.
            on_silence: called, by another thread, when etcd has not answered for some seconds, and may yet.
            probe_seconds: how often to ask for a sign of life; by default every minute.

        Raises:
            Compacted: list again: the revision is gone (this may also show in the first iteration only), or
                (Replaced) this is another cluster, or an older state of it.
        """

        def open_watch(link: Link) -> WatchStream:
            link.enter()
            stream = WatchStream(
                link.client.channel,
                endpoint=link.endpoint,
                root=self._root,
                revision=revision,
                resumed=resumed,
                metadata=self._metadata(),
                on_end=link.leave,
                on_failure=lambda: self._give_up(link),
                is_outdated=link.is_outdated,
                on_silence=on_silence,
                probe_seconds=probe_seconds,
            )
            stream.await_created(cluster_id)
            return stream

        return self._try(open_watch)

    def get(self, key: str) -> Entry | None:
        request = etcdrpc.RangeRequest(key=self._name(key))
        kvs = self._call(lambda client: client.kvstub.Range, request).kvs
        return entry_of(kvs[0], self._root) if kvs else None

    def create(self, key: str, value: str, lease: int, *, unchanged_since: int | None = None) -> Written:
        """Write a key that is not there; with `unchanged_since` only if no key beside it is newer than that.

        Raises:
            LeaseGone: `lease` has ended.
        """
        guards = [etcdtxn.absent(self._name(key))]
        if unchanged_since is not None:
            folder = key[: key.rindex("/") + 1]
            guards.append(etcdtxn.none_newer(self._name(folder), unchanged_since))
        return self._write(key, guards, value, lease)

    def replace(self, key: str, value: str, lease: int, mod_revision: int) -> Written:
        """Write a key that is still as it was at `mod_revision`.

        Raises:
            LeaseGone: `lease` has ended.
        """
        return self._write(key, [etcdtxn.unchanged(self._name(key), mod_revision)], value, lease)

    def move(self, old: str, mod_revision: int, key: str, value: str, lease: int) -> Written:
        """Write a key that is not there in the place of another that is still as it was at `mod_revision`.

        Raises:
            LeaseGone: `lease` has ended.
        """
        before = self._name(old)
        guards = [etcdtxn.unchanged(before, mod_revision), etcdtxn.absent(self._name(key))]
        return self._write(key, guards, value, lease, etcdtxn.deletion(before))

    def detach(self, key: str, mod_revision: int) -> Written:
        """Take a key that is still as it was out of its etcd lease: it keeps its value, for ever."""
        name = self._name(key)
        return self._transact(name, [etcdtxn.unchanged(name, mod_revision)], etcdtxn.detachment(name))

    def put(self, key: str, value: str) -> Written:
        """Write a key whatever is there, without a lease."""
        request = etcdrpc.PutRequest(key=self._name(key), value=value.encode())
        return Written(True, self._call(lambda client: client.kvstub.Put, request).header.revision)

    def delete(self, key: str, mod_revision: int) -> Written:
        """Delete a key that is still as it was at `mod_revision`."""
        name = self._name(key)
        return self._transact(name, [etcdtxn.unchanged(name, mod_revision)], etcdtxn.deletion(name))

    def grant(self, ttl: int) -> int:
        """A new etcd lease of `ttl` seconds; its id."""
        # The id is chosen here, so that a request that arrives twice grants one lease.
        request = etcdrpc.LeaseGrantRequest(TTL=ttl, ID=secrets.randbelow((1 << 63) - 1) + 1)
        with contextlib.suppress(LeaseExists):
            self._call(lambda client: client.leasestub.LeaseGrant, request)
        return int(request.ID)

    def keep_alive(self, lease: int) -> int:
        """Renew an etcd lease: the seconds it now has; 0 when it has ended."""
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        return int(self._call(lambda client: client.leasestub.LeaseKeepAlive, request).TTL)

    def time_to_live(self, lease: int, *, keys: bool = False) -> LeaseTime:
        """What an etcd lease has left of what it was granted, and, if asked for, how many keys hang on it."""
        request = etcdrpc.LeaseTimeToLiveRequest(ID=lease, keys=keys)
        reply = self._call(lambda client: client.leasestub.LeaseTimeToLive, request)
        return LeaseTime(int(reply.TTL), int(reply.grantedTTL), len(reply.keys))

    def revoke(self, lease: int) -> None:
        """End an etcd lease and delete the keys attached to it; one that has ended already is no error."""
        with contextlib.suppress(LeaseGone):
            self._call(lambda client: client.leasestub.LeaseRevoke, etcdrpc.LeaseRevokeRequest(ID=lease))

    def reconnect(self) -> None:
        """Make later calls on a new connection; those under way go on."""
        with self._lock:
            link, self._link = self._link, None
        if link:
            link.retire()

    def close(self) -> None:
        """Take no more calls; those under way, and the watch, end as Unreachable."""
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
        if link:
            link.close()

    # --- requests

    def _name(self, key: str) -> bytes:
        return self._root + key.encode()

    def _list(self, first: bool) -> Listing:
        entries: list[Entry] = []
        limit, key, header = PAGE_KEYS, self._root, None
        while True:
            request = etcdrpc.RangeRequest(
                key=key,
                range_end=range_end(self._root),
                limit=limit,
                revision=header.revision if header else 0,
            )
            try:
                reply = self._call(
                    lambda client: client.kvstub.Range,
                    request,
                    ATTEMPT_SECONDS if first else LIST_SECONDS,
                    attempts=len(self._endpoints) + (not first),
                )
            except TooLarge:
                if limit == 1:
                    raise
                limit = max(1, limit // 8)
                continue
            header = header or reply.header
            entries.extend(entry_of(kv, self._root) for kv in reply.kvs)
            if not reply.more:
                return Listing(header.revision, header.cluster_id, tuple(entries))
            key = reply.kvs[-1].key + b"\0"

    def _write(self, key: str, guards: Sequence[Any], value: str, lease: int, *before: Any) -> Written:
        name, content = self._name(key), value.encode()
        written = self._transact(name, guards, *before, etcdtxn.put(name, content, lease))
        there = written.entry
        if lease and there and (there.value, there.etcd_lease) == (content, lease):
            # Nobody else has our lease: this very write arrived before, and its answer was lost.
            return Written(True, there.mod_revision)
        return written

    def _transact(self, name: bytes, guards: Sequence[Any], *operations: Any) -> Written:
        """What stands at `name` is told when a guard has failed."""
        request = etcdrpc.TxnRequest(compare=guards, success=operations, failure=[etcdtxn.look(name)])
        reply = self._call(lambda client: client.kvstub.Txn, request)
        found = () if reply.succeeded else reply.responses[0].response_range.kvs
        there = entry_of(found[0], self._root) if found else None
        return Written(reply.succeeded, reply.header.revision, there)

    def _call(
        self,
        method: Callable[[Any], Any],
        request: Any,
        seconds: float | None = None,
        attempts: int | None = None,
    ) -> Any:
        def attempt(link: Link) -> Any:
            return method(link.client)(request, timeout=seconds or ATTEMPT_SECONDS, metadata=self._metadata())

        began = time.monotonic()
        try:
            return self._try(attempt, attempts)
        finally:
            self._timed(time.monotonic() - began, type(request).__name__.removesuffix("Request"))

    # --- endpoints

    def _try(self, attempt: Callable[[Link], T], attempts: int | None = None) -> T:
        """Make a call at the endpoint in use, then at the others, then at the first on a new connection."""
        failures: dict[str, AttemptError] = {}
        give_up = time.monotonic() + TOTAL_SECONDS
        left, renewed = attempts or len(self._endpoints) + 1, False
        while left and time.monotonic() < give_up:
            link = self._enter()
            try:
                self._log_in(link)
                return attempt(link)
            except grpc.RpcError as error:
                failure = explain(error, self._given)
            except AttemptError as error:
                failure = error
            except ValueError:  # what gRPC raises for a call on a closed channel
                if not self._closed:
                    raise
                continue
            finally:
                link.leave()
            if failure.kind is TokenRefused and self._settings.username and not renewed:
                self._token, renewed = None, True
                continue
            if not failure.elsewhere:
                raise failure.at(link.endpoint)
            failures[link.endpoint] = failure
            self._give_up(link)
            left -= 1
        raise joined(failures)

    def _enter(self) -> Link:
        with self._lock:
            if self._closed:
                raise Unreachable("etcd: the connection was closed by us")
            if self._link and self._link.is_outdated():
                self._link.retire()
                self._link = None
            if not self._link:
                self._link = Link(self._endpoints[self._index], self._settings, ATTEMPT_SECONDS)
            self._link.enter()
            return self._link

    def _give_up(self, link: Link) -> None:
        """Let the next call go to the next endpoint, unless another thread has seen to that."""
        with self._lock:
            if self._link is not link:
                return
            self._link = None
            self._index = (self._index + 1) % len(self._endpoints)
        link.retire()

    def _log_in(self, link: Link) -> None:
        if not self._settings.username or self._token is not None:
            return
        try:
            password = current_password(self._settings)
        except UsageError as error:
            raise AttemptError(Refused, str(error)) from None
        request = etcdrpc.AuthenticateRequest(name=self._settings.username, password=password)
        try:
            stub = etcdrpc.AuthStub(link.client.channel)
            self._token = stub.Authenticate(request, timeout=ATTEMPT_SECONDS).token
        except grpc.RpcError as error:
            if "authentication is not enabled" not in (error.details() or ""):
                raise
            self._token = ""

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (_LEADER_ONLY, ("token", self._token)) if self._token else (_LEADER_ONLY,)
