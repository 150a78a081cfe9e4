"""A thread that hangs is noticed, and systemd's watchdog is then fed no more."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanneld_py.daemon import run
from flanneld_py.daemon.heartbeats import BEAT_EVERY, LIMITS, Heartbeats
from flanneld_py.daemon.inbox import Inbox
from flanneld_py.daemon.notify import LONGEST_INTERVAL, Notifier, Watchdog, watchdog_interval

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_late_is_who_did_not_beat_in_time() -> None:
    beats = Heartbeats({"a": 10.0, "b": 20.0})
    beats.beat("b")
    beats.beat("a")
    now = time.monotonic()
    assert beats.late(now) == []
    assert beats.late(now + 15) == ["a"]
    assert beats.late(now + 25) == ["a", "b"]
    beats.beat("a")
    assert beats.late(time.monotonic() + 25) == ["a", "b"]
    assert beats.late(time.monotonic()) == []


def test_who_never_began_and_who_has_no_limit_is_not_late() -> None:
    beats = Heartbeats({"a": 10.0})
    beats.beat("registry-memory")
    assert beats.late(time.monotonic() + 1000) == []


def test_each_limit_is_that_of_a_thread() -> None:
    started = set(re.findall(r'self\._thread\("([a-z-]+)"', Path(run.__file__).read_text()))
    assert set(LIMITS) < {*started, "main"}


def test_waiting_threads_show_themselves_several_times_within_each_limit() -> None:
    assert min(LIMITS.values()) >= 3 * BEAT_EVERY


def test_a_thread_beats_while_it_waits_for_the_inbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flanneld_py.daemon.inbox.BEAT_EVERY", 0.01)
    beaten: list[str] = []
    enough = threading.Event()

    class Beats(Heartbeats):
        def beat(self, name: str) -> None:
            beaten.append(name)
            if len(beaten) >= 10:
                enough.set()

    inbox = Inbox(Beats())
    seen, _ = inbox.wait(-1)
    beaten.clear()
    enough.clear()
    thread = threading.Thread(target=inbox.wait, args=(seen,), name="reconciler")
    thread.start()
    assert enough.wait(10)
    inbox.stop()
    thread.join(10)
    assert set(beaten) == {"reconciler"}


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The end of $NOTIFY_SOCKET that is systemd's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


def told(manager: socket.socket) -> list[list[str]]:
    messages = []
    while True:
        try:
            messages.append(manager.recv(4096).decode().splitlines())
        except BlockingIOError:
            return messages


def test_the_watchdog_is_fed_while_all_threads_turn(manager: socket.socket) -> None:
    beats, notifier = Heartbeats({"a": 10.0}), Notifier()
    watchdog = Watchdog(notifier, beats)
    notifier.send(READY="1")
    beats.beat("a")
    now = time.monotonic()
    watchdog.feed(now)
    watchdog.feed(now + 15)
    watchdog.feed(now + 20)
    beats.beat("a")
    watchdog.feed(time.monotonic())
    assert told(manager) == [["READY=1"], ["WATCHDOG=1"], ["WATCHDOG=1"]]


def test_a_start_asks_for_more_time_while_all_threads_turn(manager: socket.socket) -> None:
    beats, notifier = Heartbeats({"a": 10.0}), Notifier()
    watchdog = Watchdog(notifier, beats)
    beats.beat("a")
    watchdog.feed(time.monotonic())
    watchdog.feed(time.monotonic() + 15)
    assert told(manager) == [["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=60000000"]]


def test_a_reload_never_says_ready_before_its_time(manager: socket.socket) -> None:
    notifier = Notifier()
    notifier.send_reloaded(2.5)
    assert told(manager) == []
    notifier.send(READY="1")
    notifier.send_reloaded(2.5)
    assert told(manager) == [["READY=1"], ["RELOADING=1", "MONOTONIC_USEC=2500000"], ["READY=1"]]


def test_after_stopping_nobody_says_anything_else(manager: socket.socket) -> None:
    """Found by test_daemon: a thread that was about to say how far the start has come said so after it."""
    notifier = Notifier()
    notifier.send(STOPPING="1")
    other = threading.Thread(target=lambda: notifier.send(STATUS="starting"))
    other.start()
    other.join()
    notifier.send(STATUS="stopped")
    assert told(manager) == [["STOPPING=1"], ["STATUS=stopped"]]


def test_ready_and_status_that_did_not_go_through_are_said_again(manager: socket.socket) -> None:
    """The manager's socket was full at that moment: a lost READY would make the start time out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.setblocking(False)
        try:
            while True:
                stranger.sendto(b"X=1", manager.getsockname())
        except BlockingIOError:
            pass  # it is full
    notifier = Notifier()
    notifier.send(READY="1", STATUS="starting")
    notifier.send(STATUS="in sync")
    assert not notifier.said_ready
    assert {line for message in told(manager) for line in message} == {"X=1"}
    notifier.send_owed()
    assert notifier.said_ready
    notifier.send_owed()
    assert told(manager) == [["READY=1", "STATUS=in sync"]]


@pytest.mark.parametrize(
    ("usec", "seconds"),
    [("3000000", 1.5), ("30000000", 10.0), ("", LONGEST_INTERVAL), ("0", LONGEST_INTERVAL), ("x", 10.0)],
)
def test_the_watchdog_is_fed_twice_in_its_time(usec: str, seconds: float) -> None:
    assert watchdog_interval(usec) == seconds
