"""The etcd driver against real etcd servers on loopback.

What it says is compared with etcd's own JSON gateway and etcdctl, requests are counted at the server.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.drivers import etcd, etcdwatch
from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings, WatchStream
from flanneld_py.errors import Compacted, LeaseGone, Refused, RegistryError, Unreachable, UsageError
from flanneld_py.model import Changes, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

pytestmark = pytest.mark.netns

PREFIX = "/coreos.com/network"
PASSWORD = "s3cret"  # noqa: S105 - of an etcd that lives for one test


# --- servers --------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.01)


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


class Etcd:
    """One etcd of our own. It dies with the test process and its directory goes with `close`."""

    def __init__(
        self, *options: str, scheme: str = "http", name: str = "m", peers: dict[str, int] | None = None
    ) -> None:
        self.port, self.admin_port, peer_port = free_ports(3)
        peers = peers or {name: peer_port}
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-", dir="/dev/shm"))
        self._process: subprocess.Popen[bytes] | None = None
        peer_url = f"http://127.0.0.1:{peers[name]}"
        self._command = [
            *("setpriv", "--pdeathsig", "KILL", "/usr/bin/etcd", "--name", name),
            *("--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", ",".join(f"{k}=http://127.0.0.1:{v}" for k, v in peers.items())),
            *("--listen-metrics-urls", f"http://127.0.0.1:{self.admin_port}"),
            *("--heartbeat-interval", "20", "--election-timeout", "200", *options),
        ]

    def launch(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def start(self) -> Etcd:
        self.launch()
        wait_until(self.healthy)
        return self

    def healthy(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()[-2000:]
        try:
            return '"true"' in self._admin("/health")
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        shutil.rmtree(self.directory / "data")

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory)

    def _admin(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def received(self) -> dict[str, int]:
        """Method → messages that came in over gRPC; those with none are left out."""
        found = re.findall(
            r'^grpc_server_msg_received_total\{grpc_method="(\w+)".*\} (\d+)$',
            self._admin("/metrics"),
            re.MULTILINE,
        )
        return {method: int(count) for method, count in found if count != "0"}

    @contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Fills the mapping, at the end, with the messages received meanwhile."""
        before, counted = self.received(), dict[str, int]()
        yield counted
        after = self.received()
        counted.update({m: n - before.get(m, 0) for m, n in after.items() if n != before.get(m, 0)})

    def etcdctl(self, *arguments: str) -> str:
        return subprocess.run(
            ["etcdctl", "--endpoints", self.url, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
            env={"ETCDCTL_API": "3", "PATH": os.environ["PATH"]},
        ).stdout

    # etcd's JSON gateway, faster than a process a write

    def ask(self, path: str, bodies: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        answers = []
        for body in bodies:
            connection.request("POST", f"/v3/{path}", json.dumps(body))
            answers.append(json.loads(connection.getresponse().read()))
            assert "error" not in answers[-1], answers[-1]
        connection.close()
        return answers

    def put(self, *pairs: tuple[str | bytes, str], lease: int = 0) -> int:
        """Write pairs of full key and value one by one; the last revision."""
        bodies = [{"key": b64(key), "value": b64(value), "lease": str(lease)} for key, value in pairs]
        return int(self.ask("kv/put", bodies)[-1]["header"]["revision"])

    def put_together(self, pairs: list[tuple[str, str]]) -> int:
        """Write in transactions of 100; the last revision."""
        operations = [{"requestPut": {"key": b64(key), "value": b64(value)}} for key, value in pairs]
        bodies = [{"success": operations[i : i + 100]} for i in range(0, len(operations), 100)]
        return int(self.ask("kv/txn", bodies)[-1]["header"]["revision"])

    def remove(self, key: str) -> int:
        return int(self.ask("kv/deleterange", [{"key": b64(key)}])[0]["header"]["revision"])

    def stored(self, prefix: str) -> dict[bytes, bytes]:
        body = {"key": b64(prefix + "/"), "range_end": b64(prefix + "0")}
        kvs = self.ask("kv/range", [body])[0].get("kvs", [])
        return {base64.b64decode(kv["key"]): base64.b64decode(kv.get("value", "")) for kv in kvs}


@pytest.fixture(scope="module")
def shared() -> Iterator[Etcd]:
    """For tests that do it no harm, each under a prefix of its own."""
    server = Etcd()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def servers() -> Iterator[Callable[..., Etcd]]:
    """Makes servers that a test may ill-treat; they end with it."""
    with ExitStack() as stack:

        def make(*options: str, **more: Any) -> Etcd:
            server = Etcd(*options, **more)
            stack.callback(server.close)
            return server

        yield make


_numbers = itertools.count(1)


@pytest.fixture
def prefix() -> str:
    return f"/test/{next(_numbers)}/network"


@pytest.fixture
def connect() -> Iterator[Callable[..., EtcdRegistry]]:
    """Makes registries of endpoints, a prefix and further settings; closes them."""
    with ExitStack() as stack:

        def make(*endpoints: str, prefix: str = PREFIX, **more: str) -> EtcdRegistry:
            registry = EtcdRegistry(EtcdSettings(endpoints, prefix, **more))
            stack.callback(registry.close)
            return registry

        yield make


@pytest.fixture
def registry(shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str) -> EtcdRegistry:
    made: EtcdRegistry = connect(shared.url, prefix=prefix)
    return made


@contextmanager
def watching(registry: EtcdRegistry, revision: int | None = None) -> Iterator[WatchStream]:
    listing = registry.list()
    stream = registry.watch(listing.revision if revision is None else revision, listing.cluster_id)
    try:
        yield stream
    finally:
        stream.cancel()


def take(stream: WatchStream, count: int) -> list[Changes]:
    """Items of a watch until `count` changes have come."""
    items: list[Changes] = []
    while sum(len(item.changes) for item in items) < count:
        items.append(next(stream))
    return items


def seen(items: Iterable[Changes]) -> list[tuple[str, bytes | None]]:
    return [(c.key, c.entry.value if c.entry else None) for item in items for c in item.changes]


# --- listing --------------------------------------------------------------------------------------


def test_listing_holds_exactly_what_stands_below_the_prefix(
    shared: Etcd, registry: EtcdRegistry, prefix: str
) -> None:
    lease = int(shared.ask("lease/grant", [{"TTL": 60}])[0]["ID"])
    shared.put((f"{prefix}/config", '{"Network": "10.5.0.0/16"}'), (f"{prefix}/subnets/10.5.1.0-24", "first"))
    shared.put((f"{prefix}/subnets/10.5.1.0-24", "second"), lease=lease)
    shared.put((prefix.encode() + b"/subnets/\xff", "not text"), (f"{prefix}/subnets/é", ""))
    for outside in (prefix, f"{prefix}2/config", f"{prefix}-other", f"{prefix}0"):
        shared.put((outside, "not ours"))

    listing = registry.list()

    wanted = json.loads(shared.etcdctl("get", "--prefix", f"{prefix}/", "-w", "json"))
    assert listing.revision == wanted["header"]["revision"]
    assert listing.cluster_id == wanted["header"]["cluster_id"]
    assert [(e.value, e.create_revision, e.mod_revision, e.etcd_lease) for e in listing.entries] == [
        (base64.b64decode(kv.get("value", "")), kv["create_revision"], kv["mod_revision"], kv.get("lease", 0))
        for kv in wanted["kvs"]
    ]
    keys = [entry.key for entry in listing.entries]
    assert keys == ["config", "subnets/10.5.1.0-24", "subnets/é", r"subnets/\xff"]
    assert listing.entries[1].etcd_lease == lease


def test_cold_start_costs_two_messages(
    shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str
) -> None:
    shared.put((f"{prefix}/config", "{}"))
    registry = connect(shared.url, prefix=prefix)
    with shared.counting() as counted, watching(registry):
        pass
    assert counted == {"Range": 1, "Watch": 1}


def test_ten_thousand_keys_come_in_one_request(shared: Etcd, registry: EtcdRegistry, prefix: str) -> None:
    value = (
        json.dumps({"PublicIP": "192.0.2.10", "BackendData": {"VtepMAC": "82:4b:b1:2c:8f:a1"}}) + " " * 400
    )
    keys = [f"subnets/10.{i // 256}.{i % 256}.0-24" for i in range(10_000)]
    shared.put_together([(f"{prefix}/{key}", value) for key in keys])
    with shared.counting() as counted:
        started = time.perf_counter()
        listing = registry.list()
        elapsed = time.perf_counter() - started
    print(f"10,000 keys of {len(value)} bytes listed in {elapsed * 1000:.0f} ms")  # noqa: T201 - a figure worth seeing
    assert counted == {"Range": 1}
    assert {entry.key for entry in listing.entries} == set(keys)
    assert all(entry.value == value.encode() for entry in listing.entries)
    assert elapsed < 2


def test_pages_show_one_revision(
    shared: Etcd, registry: EtcdRegistry, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(generation: int) -> None:
        shared.put_together([(f"{prefix}/subnets/{i:02}", str(generation)) for i in range(60)])

    write(0)
    monkeypatch.setattr(etcd, "PAGE_KEYS", 7)
    with shared.counting() as counted:
        assert len(registry.list().entries) == 60
    assert counted == {"Range": 9}

    over = threading.Event()

    def keep_writing() -> None:
        for generation in itertools.count(1):
            write(generation)
            if over.is_set():
                return

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        generations = set()
        for _ in range(20):
            listing = registry.list()
            assert len(listing.entries) == 60
            assert len({entry.value for entry in listing.entries}) == 1
            assert max(entry.mod_revision for entry in listing.entries) <= listing.revision
            generations.add(listing.entries[0].value)
        assert len(generations) > 5, "nothing was written meanwhile"
    finally:
        over.set()
        writer.join()


def test_answers_beyond_the_receive_limit_are_asked_for_in_parts(
    shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.put_together([(f"{prefix}/subnets/{i:03}", "x" * 1000) for i in range(300)])
    monkeypatch.setattr(etcd, "RECEIVE_BYTES", 20_000)
    registry = connect(shared.url, prefix=prefix)
    assert [entry.key for entry in registry.list().entries] == [f"subnets/{i:03}" for i in range(300)]
    shared.put((f"{prefix}/subnets/huge", "x" * 30_000))
    with pytest.raises(RegistryError, match="larger than max"):
        registry.list()


# --- watch ----------------------------------------------------------------------------------------


def test_watch_yields_every_event_below_the_prefix_in_order(
    shared: Etcd, registry: EtcdRegistry, prefix: str
) -> None:
    lease = int(shared.ask("lease/grant", [{"TTL": 60}])[0]["ID"])
    with watching(registry) as stream:
        shared.put((f"{prefix}/config", "1"), (f"{prefix}0", "not ours"), (f"{prefix}/subnets/a", "2"))
        put = shared.put((f"{prefix}/subnets/a", "3"), lease=lease)
        removed = shared.remove(f"{prefix}/config")
        shared.ask("lease/revoke", [{"ID": str(lease)}])
        items = take(stream, 5)
    assert seen(items) == [
        ("config", b"1"),
        ("subnets/a", b"2"),
        ("subnets/a", b"3"),
        ("config", None),
        ("subnets/a", None),
    ]
    changes = [change for item in items for change in item.changes]
    assert changes[2].entry == Entry("subnets/a", b"3", put - 1, put, lease)
    assert [item.revision for item in items][-2:] == [removed, removed + 1]


def assert_resumable(items: list[Changes]) -> None:
    """Whoever resumes after any item misses nothing: all that comes later is of a later revision."""
    for earlier, later in itertools.pairwise(items):
        assert all(c.entry is None or c.entry.mod_revision > earlier.revision for c in later.changes)
        assert earlier.revision <= later.revision


def test_catching_up_over_many_revisions_can_be_broken_off_anywhere(
    shared: Etcd, registry: EtcdRegistry, prefix: str
) -> None:
    """Etcd sends at most 1,000 revisions at once, under a header that names the newest of all."""
    start = registry.list().revision
    count = 2200
    shared.put(*((f"{prefix}/subnets/{i % 7}", str(i)) for i in range(count)))

    with watching(registry, start) as stream:
        items = take(stream, count)
    assert len(items) > 2, "all came in one response: this test no longer shows anything"
    assert_resumable(items)

    received: list[tuple[str, bytes | None]] = []
    while len(received) < count:
        with watching(registry, start) as stream:
            first = next(stream)
        received += seen([first])
        start = first.revision
    assert received == seen(items) == [(f"subnets/{i % 7}", str(i).encode()) for i in range(count)]


def test_fragments_of_a_response_lose_nothing(shared: Etcd, registry: EtcdRegistry, prefix: str) -> None:
    """A transaction too large for one response is sent in parts that share its revision."""
    start = registry.list().revision
    for _ in range(4):
        shared.put_together([(f"{prefix}/subnets/{i:02}", "x" * 12_000) for i in range(80)])
    with watching(registry, start) as stream:
        items = take(stream, 320)
    assert any(item.changes and item.revision == start for item in items), "nothing came in fragments"
    assert len(seen(items)) == 320
    assert_resumable(items)


def test_probes_keep_a_quiet_watch_and_a_busy_reader_alive(
    shared: Etcd, registry: EtcdRegistry, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdwatch, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(etcdwatch, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(etcdwatch, "CREATE_SECONDS", 0.05)
    with watching(registry) as stream:
        start = registry.list().revision
        shared.put(("/elsewhere", "x"))
        signs = [next(stream) for _ in range(3)]
        assert signs == [Changes(start, ())] * 3, "an answer to a probe is no place to resume from"
        # Nobody reads while etcd answers further probes; then one change is still delivered.
        before = shared.received()["Watch"]
        wait_until(lambda: shared.received()["Watch"] > before + 3)
        shared.put((f"{prefix}/config", "x"))
        assert seen(take(stream, 1)) == [("config", b"x")]


def test_cancel_from_another_thread_ends_the_iteration(registry: EtcdRegistry) -> None:
    threads = set(threading.enumerate())
    with watching(registry) as stream:
        canceller = threading.Timer(0.1, stream.cancel)
        canceller.start()
        assert list(stream) == []
        assert list(stream) == []
        canceller.join()
    wait_until(lambda: not set(threading.enumerate()) - threads)


def test_watch_from_a_compacted_revision(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    old = registry.list()
    revision = server.put(*((f"{PREFIX}/subnets/a", str(i)) for i in range(5)))
    server.etcdctl("compact", str(revision))
    with pytest.raises(Compacted, match=f"revision {old.revision + 1} is compacted"):
        next(registry.watch(old.revision, old.cluster_id))
    with watching(registry) as stream:
        server.put((f"{PREFIX}/subnets/a", "new"))
        assert seen(take(stream, 1)) == [("subnets/a", b"new")]


def test_replaced_registry_is_noticed(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    server.put(*((f"{PREFIX}/subnets/a", str(i)) for i in range(5)))
    listing = registry.list()
    with pytest.raises(Compacted, match="replaced or restored: list again"):
        registry.watch(listing.revision, listing.cluster_id + 1)
    server.kill()
    server.wipe()
    server.start()
    with pytest.raises(Compacted, match="replaced or restored: list again"):
        registry.watch(listing.revision, listing.cluster_id)
    assert registry.list().entries == ()


# --- writes and leases ----------------------------------------------------------------------------


def test_create_replace_and_delete_are_guarded(shared: Etcd, registry: EtcdRegistry, prefix: str) -> None:
    assert registry.get("subnets/a") is None

    created = registry.create("subnets/a", "mine", 0)
    assert (created.ok, created.entry) == (True, None)
    there = registry.get("subnets/a")
    assert there == Entry("subnets/a", b"mine", created.revision, created.revision, 0)

    again = registry.create("subnets/a", "other's", 0)
    assert (again.ok, again.entry) == (False, there)

    lease = registry.grant(60)
    replaced = registry.replace("subnets/a", "newer", lease, created.revision)
    assert replaced.ok
    newer = Entry("subnets/a", b"newer", created.revision, replaced.revision, lease)
    stale = registry.replace("subnets/a", "newest", 0, created.revision)
    assert (stale.ok, stale.entry) == (False, newer)
    stale = registry.delete("subnets/a", created.revision)
    assert (stale.ok, stale.entry) == (False, newer)
    assert shared.stored(prefix) == {f"{prefix}/subnets/a".encode(): b"newer"}

    assert registry.delete("subnets/a", replaced.revision).ok
    assert shared.stored(prefix) == {}
    for gone in (
        registry.delete("subnets/a", replaced.revision),
        registry.replace("subnets/a", "x", 0, replaced.revision),
    ):
        assert (gone.ok, gone.entry) == (False, None)
    assert registry.put("config", "{}").ok
    assert registry.put("config", "{ }").ok
    assert shared.stored(prefix) == {f"{prefix}/config".encode(): b"{ }"}


def test_lease_is_granted_renewed_and_ended(shared: Etcd, registry: EtcdRegistry, prefix: str) -> None:
    lease = registry.grant(60)
    assert registry.create("subnets/a", "mine", lease).ok
    assert json.loads(shared.etcdctl("lease", "timetolive", f"{lease:x}", "-w", "json"))["granted-ttl"] == 60
    with shared.counting() as counted:
        assert registry.keep_alive(lease) == 60
    assert counted == {"LeaseKeepAlive": 1}
    assert 58 <= registry.time_to_live(lease) <= 60

    registry.revoke(lease)
    assert shared.stored(prefix) == {}
    assert registry.keep_alive(lease) == 0
    assert registry.time_to_live(lease) == -1
    registry.revoke(lease)
    with pytest.raises(LeaseGone, match="requested lease not found"):
        registry.create("subnets/a", "mine", lease)
    assert shared.stored(prefix) == {}


class Swallower:
    """A TCP way to a server. Connections that are muted pass requests on, but no more answers."""

    def __init__(self, port: int) -> None:
        self._muted: set[socket.socket] = set()
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._accepter = threading.Thread(target=self._accept)
        self._threads = [self._accepter]
        self._accepter.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                pump = threading.Thread(target=self._pump, args=(source, sink))
                self._threads.append(pump)
                pump.start()

    def mute(self) -> None:
        """Mute the connections there are; later ones answer."""
        self._muted.update(self._sockets[1::2])

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if sink not in self._muted:
                    sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for each in self._sockets:
            each.close()


def test_write_whose_answer_is_lost_counts_once(
    shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "ATTEMPT_SECONDS", 0.5)
    way = Swallower(shared.port)
    try:
        registry = connect(way.url, shared.url, prefix=prefix)
        assert registry.list().entries == ()
        with shared.counting() as counted:
            way.mute()
            lease = registry.grant(60)
        assert counted == {"LeaseGrant": 2}
        assert registry.endpoint == shared.url
        assert registry.time_to_live(lease) > 0

        def create(other: EtcdRegistry) -> etcd.Written:
            return other.create("subnets/a", "mine", lease)

        def replace(other: EtcdRegistry) -> etcd.Written:
            (entry,) = registry.list().entries
            return other.replace("subnets/a", "newer", lease, entry.mod_revision)

        for write in (create, replace):
            other = connect(way.url, shared.url, prefix=prefix)
            other.list()
            with shared.counting() as counted:
                way.mute()
                written = write(other)
            assert counted["Txn"] == 2
            (entry,) = registry.list().entries
            assert written == etcd.Written(True, entry.mod_revision)
    finally:
        way.close()


def test_connection_gone_silent_is_replaced_within_the_call(
    shared: Etcd, connect: Callable[..., EtcdRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "ATTEMPT_SECONDS", 0.5)
    way = Swallower(shared.port)
    try:
        registry = connect(way.url)
        registry.list()
        way.mute()
        assert registry.get("config") is None
    finally:
        way.close()


# --- failing servers ------------------------------------------------------------------------------


def follow(registry: EtcdRegistry, items: list[Changes], over: threading.Event) -> None:
    """What a caller does: watch, and after any failure watch again from where the last one came to."""
    listing = registry.list()
    revision = listing.revision
    items.append(Changes(revision, ()))
    while not over.is_set():
        try:
            stream = registry.watch(revision, listing.cluster_id)
            try:
                for item in stream:
                    items.append(item)
                    revision = item.revision
            finally:
                stream.cancel()
        except Unreachable:
            over.wait(0.1)


def test_no_event_is_lost_over_kills_and_restarts_at_little_cost(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    items: list[Changes] = []
    over = threading.Event()
    follower = threading.Thread(target=follow, args=(registry, items, over))
    follower.start()
    try:
        wait_until(lambda: items)
        written = []
        for round_number in range(2):
            pairs = [(f"subnets/{i}", f"{round_number}") for i in range(50)]
            server.put(*((f"{PREFIX}/{key}", value) for key, value in pairs))
            written += [(key, value.encode()) for key, value in pairs]
            if round_number == 0:
                server.kill()
                with pytest.raises(Unreachable, match="connection refused"):
                    registry.get("config")
                used, began = time.process_time(), time.monotonic()
                threading.Event().wait(3)
                share = (time.process_time() - used) / (time.monotonic() - began)
                print(f"CPU while etcd is down, watching again every 0.1 s: {share:.1%}")  # noqa: T201
                assert share < 0.1
            else:
                server.signal(signal.SIGTERM)
                server.kill()
            server.start()
        server.put((f"{PREFIX}/config", "end"))
        wait_until(lambda: ("config", b"end") in seen(items))
        assert seen(items) == [*written, ("config", b"end")]
        assert {f"{PREFIX}/{k}".encode(): v for k, v in seen(items)} == server.stored(PREFIX)
    finally:
        over.set()
        registry.close()
        follower.join(10)
    assert not follower.is_alive()


def test_frozen_server(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing breaks when a server stops without closing its connections, so everything needs an end."""
    server = servers().start()
    steady, probing, calling, creating, closing = (connect(server.url) for _ in range(5))
    ended: dict[str, tuple[float, str]] = {}

    def note(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Unreachable as error:
            ended[name] = (time.monotonic() - frozen, str(error))

    with ExitStack() as stack:
        listing = steady.list()
        by_keepalive = stack.enter_context(watching(steady))
        monkeypatch.setattr(etcdwatch, "PROBE_SECONDS", 0.2)
        monkeypatch.setattr(etcdwatch, "ANSWER_SECONDS", 0.3)
        monkeypatch.setattr(etcdwatch, "CREATE_SECONDS", 0.5)
        by_probe = stack.enter_context(watching(probing))
        for registry in (calling, creating, closing):
            registry.list()
        # gRPC pings by itself where data have just come; only a quiet connection depends on keepalive.
        threading.Event().wait(1)
        server.signal(signal.SIGSTOP)
        stack.callback(server.signal, signal.SIGCONT)
        frozen = time.monotonic()
        calls: dict[str, Callable[[], object]] = {
            "watch, by keepalive": lambda: list(by_keepalive),
            "watch, by probe": lambda: list(by_probe),
            "get": lambda: calling.get("config"),
            "new watch": lambda: creating.watch(listing.revision, listing.cluster_id),
            "get, closed": lambda: closing.get("config"),
        }
        threads = [threading.Thread(target=note, args=item) for item in calls.items()]
        for thread in threads:
            thread.start()
        wait_until(lambda: "watch, by probe" in ended)
        closing.close()
        for thread in threads:
            thread.join(15)
    figures = {name: f"{seconds:.1f} s: {text}" for name, (seconds, text) in ended.items()}
    print(*figures.items(), sep="\n")  # noqa: T201 - figures worth seeing
    assert ended.keys() == calls.keys()
    assert ended["watch, by probe"][0] < 2
    assert ended["watch, by probe"][1] == f"etcd {server.url}: the watch has fallen silent"
    assert ended["watch, by keepalive"][0] < 11
    assert "fallen silent" not in ended["watch, by keepalive"][1]
    for name in ("get", "new watch"):
        assert ended[name][0] < 2 * etcd.ATTEMPT_SECONDS + 1
        assert "deadline exceeded" in ended[name][1]
    assert ended["get, closed"][0] < 2
    assert "closed by us" in ended["get, closed"][1]


def test_lost_leader_is_told_at_once(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    first_port, second_port = free_ports(2)
    peers = {"m1": first_port, "m2": second_port}
    first, second = servers(name="m1", peers=peers), servers(name="m2", peers=peers)
    first.launch()
    second.launch()
    wait_until(lambda: first.healthy() and second.healthy())
    registry = connect(first.url)
    with watching(registry) as stream:
        second.kill()
        with pytest.raises(Unreachable, match=f"etcd {first.url}: no leader"):
            list(stream)
    with pytest.raises(Unreachable, match=f"etcd {first.url}: no leader"):
        registry.get("config")


# --- endpoints ------------------------------------------------------------------------------------


def test_dead_endpoints_are_passed_over_quickly_and_then_left_alone(
    shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str
) -> None:
    (dead,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as hanging_up:
        hanging_up.settimeout(5)
        visits: list[object] = []

        def hang_up() -> None:
            while True:
                try:
                    visitor, _ = hanging_up.accept()
                except OSError:
                    return
                visits.append(visitor)
                visitor.close()

        door = threading.Thread(target=hang_up)
        door.start()
        port = hanging_up.getsockname()[1]
        registry = connect(f"http://127.0.0.1:{dead}", f"http://127.0.0.1:{port}", shared.url, prefix=prefix)
        assert registry.endpoint == f"http://127.0.0.1:{dead}"
        started = time.monotonic()
        for _ in range(5):
            registry.list()
        assert time.monotonic() - started < 0.5
        assert registry.endpoint == shared.url
        assert len(visits) == 1
        hanging_up.shutdown(socket.SHUT_RDWR)
        door.join(5)


def test_calls_and_watches_move_on_when_the_endpoint_in_use_dies(
    shared: Etcd, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    mortal = servers().start()
    registry = connect(mortal.url, shared.url)
    threads = set(threading.enumerate())
    with watching(registry) as stream:
        mortal.kill()
        with pytest.raises(Unreachable, match=f"etcd {mortal.url}: "):
            list(stream)
        wait_until(lambda: not set(threading.enumerate()) - threads)
    assert registry.endpoint == shared.url
    assert registry.get("config") is None
    mortal.start()
    with shared.counting() as counted:
        registry.get("config")
    assert counted == {"Range": 1}


def test_endpoint_may_be_a_name_or_an_ipv6_literal(
    servers: Callable[..., Etcd], connect: Callable[..., Any]
) -> None:
    server = servers()
    server._command[server._command.index("--listen-client-urls") + 1] += f",http://[::1]:{server.port}"
    server.start()
    for host in ("[::1]", "localhost"):
        assert connect(f"http://{host}:{server.port}").list().revision == 1


def test_web_proxy_of_the_environment_is_not_asked(
    shared: Etcd, connect: Callable[..., EtcdRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    connect(shared.url).list()


def test_nothing_waits_for_a_connection_that_does_not_come_about(
    connect: Callable[..., EtcdRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "ATTEMPT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        # Linux drops the SYN of whoever comes to a full queue.
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        registry = connect(f"http://127.0.0.1:{full.getsockname()[1]}")
        for call in (lambda: registry.get("config"), lambda: registry.watch(1, 1)):
            started = time.monotonic()
            with pytest.raises(Unreachable):
                call()
            assert time.monotonic() - started < 3


@contextmanager
def something_else() -> Iterator[str]:
    """A server that speaks HTTP/1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.recv(1000)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def test_messages_name_endpoint_and_cause(connect: Callable[..., EtcdRegistry]) -> None:
    first, second = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    with pytest.raises(Unreachable) as caught:
        connect(first, second).list()
    assert str(caught.value) == f"etcd {first}: connection refused; {second}: connection refused"
    with pytest.raises(Unreachable, match=r"etcd http://no\.such\.invalid:2379: the name does not resolve"):
        connect("http://no.such.invalid:2379").list()
    with something_else() as url, pytest.raises(Unreachable, match="does not speak gRPC"):
        connect(url).list()
    closed = connect(first)
    closed.close()
    with pytest.raises(Unreachable, match="closed by us"):
        closed.list()


# --- TLS and passwords ----------------------------------------------------------------------------


class Authority:
    """A CA of our own in a directory, and certificates for 127.0.0.1 by it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.ca, self._ca_key = directory / "ca.crt", directory / "ca.key"
        self._directory = directory
        self._openssl("-x509", "-keyout", self._ca_key, "-out", self.ca, "-subj", "/CN=test CA")

    def issue(self, name: str, subject: str = "IP:127.0.0.1") -> tuple[Path, Path]:
        certificate, key, request, extensions = (
            self._directory / f"{name}.{suffix}" for suffix in ("crt", "key", "csr", "ext")
        )
        self._openssl("-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(f"subjectAltName={subject}")
        signing = ["-CA", self.ca, "-CAkey", self._ca_key, "-set_serial", "7", "-extfile", extensions]
        self._run("x509", "-req", "-in", request, *signing, "-out", certificate)
        return certificate, key

    def _openssl(self, *arguments: object) -> None:
        self._run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *arguments)

    def _run(self, *arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def test_tls(tmp_path: Path, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    certificate, key = map(str, ours.issue("server"))
    server = servers("--cert-file", certificate, "--key-file", key, scheme="https").start()
    assert connect(server.url, ca_file=str(ours.ca)).list().entries == ()

    trusted = tmp_path / "trusted.crt"
    trusted.write_bytes(other.ca.read_bytes())
    registry = connect(server.url, ca_file=str(trusted))
    for doubtful in (registry, connect(server.url)):  # the second trusts the system's CAs
        with pytest.raises(Refused, match=f"etcd {server.url}: TLS verification failed"):
            doubtful.list()
    trusted.write_bytes(ours.ca.read_bytes())
    assert registry.list().entries == ()

    with pytest.raises(Unreachable, match="connection closed; does it serve https"):
        connect(server.url.replace("https", "http")).list()
    (dead,) = free_ports(1)
    with pytest.raises(Unreachable, match=r"connection refused; .*TLS verification failed"):
        connect(f"https://127.0.0.1:{dead}", server.url, ca_file=str(other.ca)).list()


def test_tls_with_client_certificates(
    tmp_path: Path, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    certificate, key = map(str, ours.issue("server"))
    options = ("--cert-file", certificate, "--key-file", key)
    server = servers(
        *options, "--client-cert-auth", "--trusted-ca-file", str(ours.ca), scheme="https"
    ).start()

    def client(authority: Authority) -> EtcdRegistry:
        cert_file, key_file = map(str, authority.issue("client"))
        made = connect(server.url, ca_file=str(ours.ca), cert_file=cert_file, key_file=key_file)
        assert isinstance(made, EtcdRegistry)
        return made

    for stranger in (client(other), connect(server.url, ca_file=str(ours.ca))):
        with pytest.raises(Refused, match="our client certificate, or the lack of one"):
            stranger.list()
    registry = client(ours)
    with watching(registry) as stream:
        server.kill()
        with pytest.raises(Unreachable):
            list(stream)
    server.start()
    assert registry.list().entries == ()


def test_certificate_of_another_host(
    tmp_path: Path, servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    ours = Authority(tmp_path / "ours")
    certificate, key = map(str, ours.issue("server", "DNS:etcd.example"))
    server = servers("--cert-file", certificate, "--key-file", key, scheme="https").start()
    with pytest.raises(Refused, match="TLS verification failed: certificate of another host"):
        connect(server.url, ca_file=str(ours.ca)).list()


def test_unusable_tls_files_are_named(tmp_path: Path, connect: Callable[..., EtcdRegistry]) -> None:
    ours = Authority(tmp_path / "ours")
    certificate = str(ours.issue("client")[0])
    _, other_key = map(str, ours.issue("other"))
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    url, ca = "https://127.0.0.1:2379", str(ours.ca)
    for files, message in (
        ({"ca_file": "/nowhere"}, "--etcd-cafile: '/nowhere': No such file or directory"),
        ({"ca_file": str(nonsense)}, f"--etcd-cafile: '{nonsense}': expected PEM certificates"),
        (
            {"ca_file": ca, "cert_file": certificate, "key_file": "/nowhere"},
            "--etcd-keyfile: '/nowhere': No such",
        ),
        (
            {"ca_file": ca, "cert_file": certificate, "key_file": other_key},
            "PEM certificate and its private key",
        ),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            connect(url, **files)


def test_password_and_what_becomes_of_its_token(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    server.put((f"{PREFIX}/config", "{}"), ("/other/config", "{}"))
    for command in (
        "user add root:r00t",
        "user grant-role root root",
        "role add node",
        f"role grant-permission node --prefix readwrite {PREFIX}/",
        f"user add node:{PASSWORD}",
        "user grant-role node node",
        "auth enable",
    ):
        server.etcdctl(*command.split())

    registry = connect(server.url, username="node", password=PASSWORD)
    with server.counting() as counted:
        listing = registry.list()
        registry.watch(listing.revision, listing.cluster_id).cancel()
    assert counted == {"Authenticate": 1, "Range": 1, "Watch": 1}

    server.kill()
    server.start()  # which has forgotten the tokens it gave out
    stream = registry.watch(listing.revision, listing.cluster_id)
    written = registry.create("subnets/a", "mine", registry.grant(60))
    assert written.ok
    assert seen(take(stream, 1)) == [("subnets/a", b"mine")]
    stream.cancel()
    server.kill()
    server.start()
    assert len(registry.list().entries) == 2

    for username, password, message in (
        ("node", "wrong", "wrong user or password"),
        ("", "", "wants a user and password"),
    ):
        with pytest.raises(Refused, match=message):
            connect(server.url, username=username, password=password).list()
    outside = connect(server.url, prefix="/other", username="node", password=PASSWORD)
    for call in (
        outside.list,
        lambda: outside.put("config", "x"),
        lambda: outside.watch(1, listing.cluster_id),
    ):
        with pytest.raises(Refused, match="permission denied"):
            call()

    server.etcdctl("--user", "root:r00t", "auth", "disable")
    assert len(registry.list().entries) == 2
