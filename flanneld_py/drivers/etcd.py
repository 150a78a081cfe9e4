"""etcd as the registry: list, watch, guarded writes, leases; with failover, and an end to every call.

The only file that knows etcd3. Used of it: channels with TLS, and the stubs. Not used: its watcher (spins
while etcd is down and loses the watch at the first error), its authentication (never renews a token), its
keep-alive and its pages (arguments accepted and ignored).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from flanneld_py.core.prefix import key_root
from flanneld_py.drivers import etcdrpc  # takes the place of etcd3's stubs, so it comes before etcd3

# isort: split

import etcd3
import grpc

from flanneld_py.drivers.etcdanswers import (
    AttemptError,
    LeaseExists,
    TokenRefused,
    TooLarge,
    entry_of,
    explain,
    joined,
    range_end,
)
from flanneld_py.drivers.etcdsettings import Endpoint, EtcdSettings, check
from flanneld_py.drivers.etcdwatch import WatchStream
from flanneld_py.errors import Compacted, LeaseGone, Unreachable
from flanneld_py.model import Entry, Fingerprint, Listing

__all__ = ["EtcdRegistry", "EtcdSettings", "WatchStream", "Written"]

T = TypeVar("T")

ATTEMPT_SECONDS = 3.0
"""Deadline of one request at one endpoint, and of connecting to it."""
LIST_SECONDS = 10.0
"""The same for a page of the listing: several MB, perhaps over a slow line."""
TOTAL_SECONDS = 15.0
"""After this no further endpoint is tried for the same call."""
PAGE_KEYS = 20_000
RECEIVE_BYTES = 64 << 20
"""gRPC's own limit is 4 MiB, less than a listing of ten thousand records may need."""

_LEADER_ONLY = ("hasleader", "true")
"""Metadata by which an etcd member that has lost the leader refuses at once, and ends watches."""


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a write. When its guard failed, `entry` is what stood there (None: nothing)."""

    ok: bool
    revision: int
    """Where the key was written, or the guard was checked."""
    entry: Entry | None = None


class _Link:
    """One channel to one endpoint. Given up, it is closed when its last user has left."""

    def __init__(self, endpoint: Endpoint, settings: EtcdSettings) -> None:
        """Returns at once: gRPC connects with the first call. TLS files are read anew for each link."""
        self.endpoint = str(endpoint)
        self._lock = threading.Lock()
        self._users = 0
        self._retired = False
        tls = {}
        if endpoint.tls:
            tls["ca_cert"] = settings.trusted_file
            if settings.cert_file:
                tls |= {"cert_cert": settings.cert_file, "cert_key": settings.key_file}
        try:
            self.client = etcd3.client(endpoint.host, endpoint.port, grpc_options=_channel_options(), **tls)
        except OSError as error:
            raise Unreachable(f"etcd {endpoint}: cannot read {error.filename}: {error.strerror}") from None

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            self._settle()

    def retire(self) -> None:
        with self._lock:
            self._retired = True
            self._settle()

    def close(self) -> None:
        """End the calls under way, too."""
        self.client.close()

    def _settle(self) -> None:
        if self._retired and not self._users:
            self.client.close()


def _channel_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", RECEIVE_BYTES),
        # Keepalive alone finds a frozen server after 25 s and more; with the ping timeout it is within 9 s.
        # etcd takes pings more often than every 5 s, or without a call, for abuse and hangs up.
        ("grpc.keepalive_time_ms", 5500),
        ("grpc.keepalive_timeout_ms", 3000),
        ("grpc.http2.ping_timeout_ms", 3000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 0),
        # By its name a pause, it is the time allowed for connecting.
        ("grpc.min_reconnect_backoff_ms", int(ATTEMPT_SECONDS * 1000)),
        ("grpc.initial_reconnect_backoff_ms", 250),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A new channel is to connect at once: not wait out the pause of the one just given up …
        ("grpc.use_local_subchannel_pool", 1),
        # … nor go through a web proxy that the environment happens to name.
        ("grpc.enable_http_proxy", 0),
    ]


class EtcdRegistry:
    """The keys below one prefix. Any thread may call; keys are relative to the prefix.

    A call that an endpoint leaves unanswered is made at the others, then once more at the first on a new
    connection; every request is therefore one that may arrive twice. Every method raises:

        Unreachable: no endpoint answered, each within ATTEMPT_SECONDS, all within little over TOTAL_SECONDS.
        Refused: wrong password, no permission, or TLS verification failed at every endpoint.
    """

    def __init__(self, settings: EtcdSettings) -> None:
        """Check the settings; nothing is sent yet.

        Raises:
            UsageError: a setting cannot be meant; the text names its flag.
        """
        self._settings = settings
        self._endpoints = check(settings)
        self._root = key_root(settings.prefix).encode(errors="surrogateescape")
        self._lock = threading.Lock()
        self._index = 0
        self._link: _Link | None = None
        self._closed = False
        self._token: str | None = None
        """None: to be asked for. Empty: etcd has authentication switched off."""

    @property
    def endpoint(self) -> str:
        """The endpoint in use, or the next to be tried."""
        return str(self._endpoints[self._index])

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

    def watch(self, revision: int, cluster_id: int, *, resumed: bool = False) -> WatchStream:
        """Follow all keys from just after a revision.

        Args:
            revision: where a listing or, when `resumed`, an earlier watch ended.
            cluster_id: of the etcd that gave it.
            resumed: time may have gone by since, in which etcd may have compacted.

        Raises:
            Compacted: list again: the revision is gone (this may also show in the first iteration only), or
                (Replaced) this is another cluster, or an older state of it.
        """

        def open_watch(link: _Link) -> WatchStream:
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
            )
            stream.await_created(cluster_id)
            return stream

        return self._try(open_watch)

    def get(self, key: str) -> Entry | None:
        request = etcdrpc.RangeRequest(key=self._name(key))
        kvs = self._call(lambda client: client.kvstub.Range, request).kvs
        return entry_of(kvs[0], self._root) if kvs else None

    def create(self, key: str, value: str, lease: int) -> Written:
        """Write a key that is not there.

        Raises:
            LeaseGone: `lease` has ended.
        """
        absent = etcdrpc.Compare(key=self._name(key), target=etcdrpc.Compare.VERSION, version=0)
        return self._write(key, absent, value, lease)

    def replace(self, key: str, value: str, lease: int, mod_revision: int) -> Written:
        """Write a key that is still as it was at `mod_revision`.

        Raises:
            LeaseGone: `lease` has ended.
        """
        return self._write(key, self._unchanged(key, mod_revision), value, lease)

    def put(self, key: str, value: str) -> Written:
        """Write a key whatever is there, without a lease."""
        request = etcdrpc.PutRequest(key=self._name(key), value=value.encode())
        return Written(True, self._call(lambda client: client.kvstub.Put, request).header.revision)

    def delete(self, key: str, mod_revision: int) -> Written:
        """Delete a key that is still as it was at `mod_revision`."""
        operation = etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=self._name(key)))
        return self._transact(key, self._unchanged(key, mod_revision), operation)

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

    def time_to_live(self, lease: int) -> int:
        """Seconds an etcd lease has left; -1 when it has ended."""
        request = etcdrpc.LeaseTimeToLiveRequest(ID=lease)
        return int(self._call(lambda client: client.leasestub.LeaseTimeToLive, request).TTL)

    def revoke(self, lease: int) -> None:
        """End an etcd lease and delete the keys attached to it; one that has ended already is no error."""
        with contextlib.suppress(LeaseGone):
            self._call(lambda client: client.leasestub.LeaseRevoke, etcdrpc.LeaseRevokeRequest(ID=lease))

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

    def _unchanged(self, key: str, mod_revision: int) -> Any:
        return etcdrpc.Compare(key=self._name(key), target=etcdrpc.Compare.MOD, mod_revision=mod_revision)

    def _write(self, key: str, guard: Any, value: str, lease: int) -> Written:
        put = etcdrpc.PutRequest(key=self._name(key), value=value.encode(), lease=lease)
        written = self._transact(key, guard, etcdrpc.RequestOp(request_put=put))
        there = written.entry
        if lease and there and (there.value, there.etcd_lease) == (put.value, lease):
            # Nobody else has our lease: this very write arrived before, and its answer was lost.
            return Written(True, there.mod_revision)
        return written

    def _transact(self, key: str, guard: Any, operation: Any) -> Written:
        look = etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=self._name(key)))
        request = etcdrpc.TxnRequest(compare=[guard], success=[operation], failure=[look])
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
        def attempt(link: _Link) -> Any:
            return method(link.client)(request, timeout=seconds or ATTEMPT_SECONDS, metadata=self._metadata())

        return self._try(attempt, attempts)

    # --- endpoints

    def _try(self, attempt: Callable[[_Link], T], attempts: int | None = None) -> T:
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
                failure = explain(error)
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

    def _enter(self) -> _Link:
        with self._lock:
            if self._closed:
                raise Unreachable("etcd: the connection was closed by us")
            if not self._link:
                self._link = _Link(self._endpoints[self._index], self._settings)
            self._link.enter()
            return self._link

    def _give_up(self, link: _Link) -> None:
        """Let the next call go to the next endpoint, unless another thread has seen to that."""
        with self._lock:
            if self._link is not link:
                return
            self._link = None
            self._index = (self._index + 1) % len(self._endpoints)
        link.retire()

    def _log_in(self, link: _Link) -> None:
        if not self._settings.username or self._token is not None:
            return
        request = etcdrpc.AuthenticateRequest(name=self._settings.username, password=self._settings.password)
        try:
            stub = etcdrpc.AuthStub(link.client.channel)
            self._token = stub.Authenticate(request, timeout=ATTEMPT_SECONDS).token
        except grpc.RpcError as error:
            if "authentication is not enabled" not in (error.details() or ""):
                raise
            self._token = ""

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (_LEADER_ONLY, ("token", self._token)) if self._token else (_LEADER_ONLY,)
