"""The etcd driver where etcd fails or is not there."""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from flanneld_py.drivers import etcd, etcdwatch
from flanneld_py.drivers.etcd import EtcdRegistry
from flanneld_py.errors import Unreachable
from flanneld_py.model import Changes
from tests.netns.etcd_servers import PREFIX, Etcd, free_ports, wait_until
from tests.netns.registry_clients import following, seen, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.netns


# --- failing servers ------------------------------------------------------------------------------


def test_no_event_is_lost_over_kills_and_restarts_at_little_cost(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    with following(registry) as items:
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


def test_silence_is_told_before_a_watch_is_given_up_for_it(
    servers: Callable[..., Etcd], connect: Callable[..., EtcdRegistry]
) -> None:
    server = servers().start()
    registry = connect(server.url)
    listing = registry.list()
    told: list[float] = []
    came: list[Changes | str] = []
    stream = registry.watch(
        listing.revision,
        listing.cluster_id,
        on_silence=lambda: told.append(time.monotonic()),
        probe_seconds=lambda: 0.0,  # as soon as there was time for an answer
    )

    def listen() -> None:
        try:
            came.extend(stream)
        except Unreachable as error:
            came.append(str(error))

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: len(came) > 1)
    assert told == []
    server.signal(signal.SIGSTOP)
    frozen, signs = time.monotonic(), len(came)
    wait_until(lambda: told)
    assert told[0] - frozen < etcdwatch.ANSWER_SECONDS
    server.signal(signal.SIGCONT)
    wait_until(lambda: len(came) > signs + 1)
    assert all(isinstance(sign, Changes) for sign in came), "late, but the watch goes on"
    server.signal(signal.SIGSTOP)
    listener.join(15)
    server.signal(signal.SIGCONT)
    assert came[-1] == f"etcd {server.url}: the watch has fallen silent"
    assert len(told) == 2, "once for each silence"


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
