"""The control socket, between the daemon's own server and flannelctl."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flanneld_py.cli.ctl import control as ctl_control
from flanneld_py.cli.ctl.control import NoAnswer, ask
from flanneld_py.daemon.control import MOST_CLIENTS, Control
from flanneld_py.errors import FlanneldError, KernelError
from tests.unit.control_sockets import daemon

STATUS = {"ready": True}


def test_the_daemons_error_is_passed_on(tmp_path: Path) -> None:
    def fail() -> None:
        raise KernelError("cannot read routes")

    with daemon(tmp_path, plan=fail) as path:
        with pytest.raises(FlanneldError, match="the daemon says: cannot read routes"):
            ask(path, "plan")
        with pytest.raises(FlanneldError, match="the daemon says: op 'tea': one of plan was expected"):
            ask(path, "tea")


@pytest.mark.parametrize("answer", [b"", b"{", b"[]\n", b"{}\n"])
def test_a_broken_answer(tmp_path: Path, answer: bytes) -> None:
    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer)

    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with pytest.raises(NoAnswer, match="the answer broke off"):
            ask(path, "status")
        thread.join(5)


def test_a_daemon_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctl_control, "ANSWER_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "x.sock"))
        server.listen()
        with pytest.raises(NoAnswer, match="no answer in time"):
            ask(tmp_path / "x.sock", "status")


def test_silent_clients_hold_nobody_up(tmp_path: Path) -> None:
    with daemon(tmp_path, status=lambda: STATUS) as path, ExitStack() as stack:
        for _ in range(MOST_CLIENTS + 5):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
            client.sendall(b"{")
        begun = time.monotonic()
        assert ask(path, "status") == STATUS
        assert time.monotonic() - begun < 1


def test_one_who_asks_waits_for_his_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sock"
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        monkeypatch.setattr(ctl_control, "CONNECT_SECONDS", 0.1)
        with pytest.raises(NoAnswer, match="no answer in time"):
            ask(path, "status")
        monkeypatch.setattr(ctl_control, "CONNECT_SECONDS", 5)

        def serve() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                stack.enter_context(connection).sendall(b'{"result": "well"}\n')

        threading.Timer(0.1, serve).start()
        assert ask(path, "status") == "well"


def test_a_request_nested_deeply_is_refused(tmp_path: Path) -> None:
    with daemon(tmp_path, status=lambda: STATUS) as path, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"[" * 4000 + b"\n")
        assert b"must be one line of JSON" in client.recv(1000)
        assert ask(path, "status") == STATUS


def answer(path: Path) -> Any:
    """As soon as there is one."""
    end = time.monotonic() + 5
    while True:
        try:
            return ask(path, "status")
        except NoAnswer:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_socket_that_is_deleted_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "flanneld-py.sock"
    control = Control(path, {"status": lambda: STATUS})
    thread = threading.Thread(target=control.run)
    thread.start()
    other = tmp_path / "a file"
    other.touch()
    try:
        assert answer(path) == STATUS
        path.parent.rename(tmp_path / "elsewhere")
        control.check()
        assert answer(path) == STATUS
        other.replace(path)
        control.check()
        assert answer(path) == STATUS
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        control.stop()
        thread.join(5)
    assert not thread.is_alive()
    assert not path.exists()


def test_too_many_open_files_end_no_control_thread(tmp_path: Path) -> None:
    """In a process of its own, since the limit is for all of it."""
    script = """
import os, resource, socket, sys, threading, time
from pathlib import Path
from flanneld_py.daemon import log
from flanneld_py.daemon.control import Control
log.configure(0)
path = Path(sys.argv[1])
control = Control(path, {"status": lambda: "well"})
thread = threading.Thread(target=control.run)
thread.start()
client = socket.socket(socket.AF_UNIX)
lowest = os.dup(0)
os.close(lowest)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
client.connect(str(path))
client.sendall(b'{"op":"status"}\\n')
before = time.process_time()
time.sleep(0.5)
assert time.process_time() - before < 0.2, "it spins"
assert thread.is_alive()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
client.settimeout(5)
print(client.recv(100))
control.stop()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.sock")],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, 'b\'{"result": "well"}\\n\'\n'), done.stderr
