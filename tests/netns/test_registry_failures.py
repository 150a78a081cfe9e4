"""The etcd driver where etcd fails, is not there, or asks for certificates and passwords."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers import etcd, etcdwatch
from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings, WatchStream
from flanneld_py.errors import Refused, Unreachable, UsageError
from flanneld_py.model import Changes
from tests.netns.etcd_servers import Authority, Etcd, free_ports, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

pytestmark = pytest.mark.netns

PREFIX = "/coreos.com/network"
PASSWORD = "s3cret"  # noqa: S105 - of an etcd that lives for one test


@pytest.fixture(scope="module")
def shared() -> Iterator[Etcd]:
    """For tests that do it no harm."""
    with Etcd() as server:
        yield server.start()


@pytest.fixture
def servers() -> Iterator[Callable[..., Etcd]]:
    """Makes servers that a test may ill-treat; they end with it."""
    with ExitStack() as stack:
        yield lambda *options, **more: stack.enter_context(Etcd(*options, **more))


@pytest.fixture
def connect() -> Iterator[Callable[..., EtcdRegistry]]:
    """Makes registries of endpoints, a prefix and further settings; closes them."""
    with ExitStack() as stack:

        def make(*endpoints: str, prefix: str = PREFIX, **more: str) -> EtcdRegistry:
            registry = EtcdRegistry(EtcdSettings(endpoints, prefix, **more))
            stack.callback(registry.close)
            return registry

        yield make


@contextmanager
def watching(registry: EtcdRegistry, revision: int | None = None) -> Iterator[WatchStream]:
    listing = registry.list()
    stream = registry.watch(listing.revision if revision is None else revision, listing.cluster_id)
    try:
        yield stream
    finally:
        stream.cancel()


def seen(items: Iterable[Changes]) -> list[tuple[str, bytes | None]]:
    return [(c.key, c.entry.value if c.entry else None) for item in items for c in item.changes]


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


def test_first_listing_of_a_frozen_server_fails_soon(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    frozen, well = servers().start(), servers().start()
    frozen.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(Unreachable, match="deadline exceeded"):
            connect(frozen.url).list(first=True)
        assert time.monotonic() - started < etcd.ATTEMPT_SECONDS + 1
        started = time.monotonic()
        registry = connect(frozen.url, well.url)
        assert registry.list(first=True).entries == ()
        assert time.monotonic() - started < etcd.ATTEMPT_SECONDS + 1
        assert registry.endpoint == well.url
    finally:
        frozen.signal(signal.SIGCONT)


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
    shared: Etcd, connect: Callable[..., EtcdRegistry]
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
        registry = connect(f"http://127.0.0.1:{dead}", f"http://127.0.0.1:{port}", shared.url)
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
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers(hosts=("127.0.0.1", "[::1]")).start()
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

    with pytest.raises(Unreachable, match="connection closed; if it never worked, try https"):
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
    assert seen([next(stream)]) == [("subnets/a", b"mine")]
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
