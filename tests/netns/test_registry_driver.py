"""The etcd driver against a real etcd on loopback: listing, watching, writing.

What it says is compared with etcd's own JSON gateway and etcdctl, requests are counted at the server.
"""

from __future__ import annotations

import base64
import itertools
import json
import threading
import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers import etcd, etcdlink, etcdwatch
from flanneld_py.drivers.etcd import EtcdRegistry, WatchStream
from flanneld_py.errors import Compacted, LeaseGone, RegistryError, Replaced
from flanneld_py.model import Changes, Entry, Fingerprint
from tests.netns.etcd_servers import PREFIX, Etcd, Swallower, wait_until
from tests.netns.registry_clients import seen, watching

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.netns


_numbers = itertools.count(1)


@pytest.fixture
def prefix() -> str:
    return f"/test/{next(_numbers)}/network"


@pytest.fixture
def registry(shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str) -> EtcdRegistry:
    made: EtcdRegistry = connect(shared.url, prefix=prefix)
    return made


def take(stream: WatchStream, count: int) -> list[Changes]:
    """Items of a watch until `count` changes have come."""
    items: list[Changes] = []
    while sum(len(item.changes) for item in items) < count:
        items.append(next(stream))
    return items


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
    monkeypatch.setattr(etcdlink, "RECEIVE_BYTES", 20_000)
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


def test_a_delete_that_compaction_stops_at_is_not_missed(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    """etcd-io/etcd#18089: 3.4.23 forgets the delete at the very revision that a watch resumes from."""
    server = servers().start()
    registry = connect(server.url)
    server.put((f"{PREFIX}/subnets/a", "1"))
    known = registry.list()
    revision = server.remove(f"{PREFIX}/subnets/a")
    server.etcdctl("compact", str(revision))
    server.put((f"{PREFIX}/subnets/b", "2"))
    with pytest.raises(Compacted):
        next(registry.watch(known.revision, known.cluster_id, resumed=True))


def test_a_resumed_watch_does_not_repeat_what_is_known(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    server.put((f"{PREFIX}/subnets/a", "1"))
    known = registry.list()
    stream = registry.watch(known.revision, known.cluster_id, resumed=True)
    try:
        server.put((f"{PREFIX}/subnets/b", "2"))
        assert [change.key for changes in take(stream, 1) for change in changes.changes] == ["subnets/b"]
    finally:
        stream.cancel()


def test_fingerprint_is_of_the_past_and_of_this_prefix_only(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    assert registry.fingerprint(1) == Fingerprint(0, 0)
    first = server.put((f"{PREFIX}/config", "1"), (f"{PREFIX}/subnets/z", "1"), (f"{PREFIX}/subnets/a", "1"))
    elsewhere = server.put((f"{PREFIX}0", "x"), (f"{PREFIX}", "x"))
    again = server.put((f"{PREFIX}/subnets/z", "2"))
    gone = server.remove(f"{PREFIX}/subnets/z")
    with server.counting() as counted:
        found = [registry.fingerprint(revision) for revision in (first, elsewhere, again, gone)]
    assert found == [
        Fingerprint(3, first),
        Fingerprint(3, first),
        Fingerprint(3, again),
        Fingerprint(2, first),
    ]
    assert counted == {"Range": 4}
    server.etcdctl("compact", str(gone))
    with pytest.raises(Compacted) as caught:
        registry.fingerprint(again)
    assert not isinstance(caught.value, Replaced)
    assert registry.fingerprint(gone) == Fingerprint(2, first)


def test_replaced_registry_is_noticed(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    server.put(*((f"{PREFIX}/subnets/a", str(i)) for i in range(5)))
    listing = registry.list()
    assert registry.fingerprint(listing.revision) == Fingerprint(1, listing.revision)
    with pytest.raises(Replaced, match="replaced or restored: list again"):
        registry.watch(listing.revision, listing.cluster_id + 1)
    server.kill()
    server.wipe()
    server.start()
    with pytest.raises(Replaced, match="replaced or restored: list again"):
        registry.watch(listing.revision, listing.cluster_id)
    with pytest.raises(Replaced, match="replaced or restored: list again"):
        registry.fingerprint(listing.revision)
    assert registry.list().entries == ()
    server.put(*(("/elsewhere", str(i)) for i in range(listing.revision)))
    registry.watch(listing.revision, listing.cluster_id, resumed=True).cancel()
    assert registry.fingerprint(listing.revision) == Fingerprint(0, 0), "nothing else gives it away"


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
    left, granted, keys = registry.time_to_live(lease, keys=True)
    assert (58 <= left <= 60, granted, keys) == (True, 60, 1)

    registry.revoke(lease)
    assert shared.stored(prefix) == {}
    assert registry.keep_alive(lease) == 0
    assert registry.time_to_live(lease).left == -1
    registry.revoke(lease)
    with pytest.raises(LeaseGone, match="requested lease not found"):
        registry.create("subnets/a", "mine", lease)
    assert shared.stored(prefix) == {}


def test_write_whose_answer_is_lost_counts_once(
    shared: Etcd, connect: Callable[..., EtcdRegistry], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "ATTEMPT_SECONDS", 0.5)
    with Swallower(shared.port) as way:
        registry = connect(way.url, shared.url, prefix=prefix)
        assert registry.list().entries == ()
        with shared.counting() as counted:
            way.mute()
            lease = registry.grant(60)
        assert counted == {"LeaseGrant": 2}
        assert registry.endpoint == shared.url
        assert registry.time_to_live(lease).left > 0

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


def test_connection_gone_silent_is_replaced_within_the_call(
    shared: Etcd, connect: Callable[..., EtcdRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "ATTEMPT_SECONDS", 0.5)
    with Swallower(shared.port) as way:
        registry = connect(way.url)
        registry.list()
        way.mute()
        assert registry.get("config") is None
