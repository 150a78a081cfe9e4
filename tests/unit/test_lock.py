"""The locks: what they are called, who is said to hold them, and what is no fault of another daemon."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

import pytest

from flanneld_py.core.ownership import file_lock_name, lock_name
from flanneld_py.core.prefix import normal_prefix
from flanneld_py.daemon import lock
from flanneld_py.daemon.lock import Locks
from flanneld_py.errors import HostError, UsageError


@pytest.fixture
def prefix() -> str:
    """One that nobody on this machine uses."""
    return f"/test/{secrets.token_hex(8)}"


def test_short_names_are_readable_and_long_ones_fit() -> None:
    assert lock_name("/coreos.com/network") == "\0flanneld-py:/coreos.com/network"
    for length in (94, 95, 96, 200, 5000):
        for letter in ("x", "ü", "語"):
            name = lock_name("/" + letter * length)
            assert len(name.encode()) <= 108
            assert name.startswith("\0flanneld-py:/" + letter * 10)
            assert name != lock_name("/" + letter * (length + 1))
    assert file_lock_name("/" + "x" * 5000) != file_lock_name("/" + "x" * 5001)
    assert file_lock_name("/\udcff" * 300)
    assert file_lock_name("/x") != lock_name("/x")


def test_a_prefix_that_is_no_text() -> None:
    with pytest.raises(UsageError, match=r"--etcd-prefix: '/\\udcff': expected UTF-8 text"):
        normal_prefix("/\udcff")


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM])
def test_the_holder_is_named(tmp_path: Path, prefix: str, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as squatter:
        squatter.bind(lock_name(prefix))
        with pytest.raises(HostError, match=f"works on prefix {prefix} on this host") as caught:
            Locks(prefix, tmp_path / "state", tmp_path / "subnet.env")
    comm = Path("/proc/self/comm").read_text().strip()
    assert f"@flanneld-py:{prefix} is held by pid {os.getpid()} ({comm})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_prefix_can_be_locked(tmp_path: Path, prefix: str) -> None:
    long = prefix + "/x" * 300
    locks = Locks(long, tmp_path / "a", tmp_path / "a.env")
    with pytest.raises(HostError, match="another flanneld-py"):
        Locks(long, tmp_path / "b", tmp_path / "b.env")
    Locks(long + "x", tmp_path / "b", tmp_path / "b.env").release()
    locks.release()
    Locks(long, tmp_path / "b", tmp_path / "b.env").release()


def test_one_subnet_file_is_for_one_daemon(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    locks = Locks(prefix, tmp_path / "a", tmp_path / "subnet.env")
    other = tmp_path / "link" / "subnet.env"
    with pytest.raises(HostError, match=f"--subnet-file {other} is in use by another flanneld-py: .* pid"):
        Locks(f"{prefix}/other", tmp_path / "b", other)
    locks.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"], "nothing is left beside it"


def test_a_limit_is_not_taken_for_another_daemon(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "lock_name", lambda _prefix: "\0" + "x" * 200)
    with pytest.raises(OSError, match="too long"):
        Locks(prefix, tmp_path, tmp_path / "subnet.env")
