"""The thread that follows the registry, against a real etcd on loopback."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from flanneld_py.daemon import leftout, registrywatch
from flanneld_py.daemon.configwatch import ConfigWatch
from flanneld_py.daemon.inbox import Inbox
from flanneld_py.daemon.registrywatch import RegistryWatch
from flanneld_py.drivers.etcd import EtcdRegistry, EtcdSettings
from tests.netns.etcd_servers import Etcd, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "/coreos.com/network"
KEY = "10.5.34.0-24"
RECORD = '{"PublicIP":"192.0.2.7"}'


@pytest.fixture
def server() -> Iterator[Etcd]:
    with Etcd() as server:
        yield server.start()


@contextmanager
def following(server: Etcd) -> Iterator[tuple[RegistryWatch, Inbox]]:
    """Running, and in sync when the block begins."""
    registry, inbox = EtcdRegistry(EtcdSettings((server.url,), PREFIX)), Inbox()
    config = ConfigWatch(PREFIX, inbox, registry.config_lines)
    watch = RegistryWatch(registry, config, inbox)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        wait_until(lambda: inbox.levels.registry.state == "in sync")
        yield watch, inbox
    finally:
        inbox.stop()
        watch.stop()
        registry.close()
        thread.join(10)
    assert not thread.is_alive()


def epoch_and_keys(inbox: Inbox) -> tuple[int, set[str]]:
    snapshot = inbox.levels.snapshot
    assert snapshot is not None
    return snapshot.epoch, set(snapshot.records)


def test_a_resumed_watch_asks_once_whether_etcd_is_still_the_same(server: Etcd) -> None:
    server.put((f"{PREFIX}/subnets/{KEY}", RECORD), ("/elsewhere", "x"))
    with following(server) as (_, inbox):
        before = epoch_and_keys(inbox)
        server.kill()
        wait_until(lambda: inbox.levels.registry.state == "unreachable")
        server.start()
        wait_until(lambda: inbox.levels.registry.state == "in sync")
        assert server.received() == {"Range": 1, "Watch": 1}
        assert epoch_and_keys(inbox) == before


def test_another_history_is_listed_even_when_nothing_is_left_to_show_it(server: Etcd) -> None:
    known = server.put((f"{PREFIX}/subnets/{KEY}", RECORD))
    with following(server) as (_, inbox):
        epoch, _ = epoch_and_keys(inbox)
        server.kill()
        wait_until(lambda: inbox.levels.registry.state == "unreachable")
        server.wipe()
        server.start()
        server.put(*(("/elsewhere", "x") for _ in range(known + 9)))
        wait_until(lambda: epoch_and_keys(inbox) == (epoch + 1, set()))
        server.put((f"{PREFIX}/subnets/{KEY}", RECORD))
        wait_until(lambda: epoch_and_keys(inbox) == (epoch + 1, {KEY}))


def test_distrust_lists_again_at_once_but_not_again_and_again(
    server: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put((f"{PREFIX}/subnets/{KEY}", RECORD))
    with following(server) as (watch, inbox):
        wait_until(lambda: server.received() == {"Put": 1, "Range": 1, "Watch": 1})
        watch.distrust()
        wait_until(lambda: server.received() == {"Put": 1, "Range": 2, "Watch": 2})
        for _ in range(10):
            watch.distrust()
        server.put((f"{PREFIX}/subnets/10.5.35.0-24", RECORD))
        wait_until(lambda: len(epoch_and_keys(inbox)[1]) == 2)
        assert server.received() == {"Put": 2, "Range": 2, "Watch": 2}
        monkeypatch.setattr(registrywatch, "DISTRUST_AT_MOST_EVERY", 0.0)
        watch.distrust()
        wait_until(lambda: server.received() == {"Put": 2, "Range": 3, "Watch": 3})


def test_how_many_more_are_bad_is_told_though_nothing_happens_any_more(
    server: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftout, "SHOWN", 0)
    monkeypatch.setattr(leftout, "PERIOD", 3.0)
    with capture_logs() as logs, following(server):

        def told() -> list[int]:
            return [line["count"] for line in logs if line["event"] == "bad_records"]

        server.put((f"{PREFIX}/subnets/{KEY}", "?"))
        wait_until(lambda: told() == [1])
        server.put(*((f"{PREFIX}/subnets/10.5.{number}.0-24", "?") for number in (35, 36)))
        wait_until(lambda: told() == [1, 2])
