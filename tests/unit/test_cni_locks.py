"""Calls of cni/flannel for one container at the same time, and after one that was killed."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from flanneld_py.lab import wait_for
from tests.unit.cni_calls import Setting, load

if TYPE_CHECKING:
    from pathlib import Path

BEGINS = """
: >"$NOTES/begun"
for _ in $(seq 500); do if [ -e "$NOTES/go" ]; then break; fi; sleep 0.02; done
"""
flannel = load()


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def start(setting: Setting, verb: str) -> subprocess.Popen[str]:
    """A call that is not waited for."""
    child = subprocess.Popen(
        setting.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=setting.env(verb),
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(setting.conf))
    child.stdin.close()
    child.stdin = None
    return child


def begun(setting: Setting) -> None:
    """Wait until the delegate is at work."""
    wait_for((setting.notes / "begun").exists, 10, "the delegate to begin")


def go(setting: Setting) -> None:
    """Let the delegate end."""
    (setting.notes / "go").touch()


def finished(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    with child:
        stdout, stderr = child.communicate(timeout=20)
    return child.returncode, stdout, stderr


def in_process(setting: Setting, verb: str = "DEL") -> Any:
    return flannel.Call(setting.env(verb), json.dumps(setting.conf).encode())


def test_all_of_several_dels_at_once_succeed(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.do("DEL", BEGINS)
    children = [start(setting, "DEL") for _ in range(4)]
    begun(setting)
    go(setting)
    assert [finished(child) for child in children] == [(0, "", "")] * 4
    assert setting.verbs == ["ADD", "DEL"], "one did it, the others found nothing left"
    assert setting.states == {}


def test_gc_leaves_alone_what_is_being_detached(setting: Setting) -> None:
    setting.succeed("ADD")
    setting.do("DEL", BEGINS)
    child = start(setting, "DEL")
    begun(setting)
    setting.conf |= {"cniVersion": "1.1.0", "cni.dev/valid-attachments": []}
    setting.succeed("GC")
    go(setting)
    assert finished(child) == (0, "", "")
    assert [verb for verb in setting.verbs if verb in {"ADD", "DEL"}] == ["ADD", "DEL"]
    assert setting.states == {}


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_del_waits_for_the_delegate_of_a_killed_add(setting: Setting, version: str) -> None:
    """Else what that still attaches would stay, with no file that tells of it."""
    setting.conf["cniVersion"] = version
    setting.do("ADD", f'{BEGINS}: >"$NOTES/attached"')
    setting.do("DEL", 'rm "$NOTES/attached" || exit 1')
    add = start(setting, "ADD")
    begun(setting)
    add.kill()
    add.communicate()
    child = start(setting, "DEL")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    assert list(setting.states) == ["c1"]
    go(setting)
    assert finished(child) == (0, "", "")
    assert setting.verbs == ["ADD", "DEL"]
    assert not (setting.notes / "attached").exists()
    assert setting.states == {}


def test_code_11_when_it_takes_too_long(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.succeed("ADD")
    monkeypatch.setattr(flannel, "LOCK_SECONDS", 0.1)
    path = setting.data_dir / "c1"
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        earlier = time.monotonic()
        with pytest.raises(flannel.Failure) as caught:
            flannel.own_state_file(in_process(setting))
        assert time.monotonic() - earlier >= 0.1
    assert (caught.value.code, str(path) in caught.value.details) == (11, True)
    assert list(setting.states) == ["c1"]


def test_a_file_that_another_call_removes_meanwhile_is_not_taken(setting: Setting) -> None:
    setting.succeed("ADD")
    path = setting.data_dir / "c1"
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert flannel.lock(str(path)) is None
        path.unlink()
    assert flannel.lock(str(path)) is None
    assert flannel.own_state_file(in_process(setting)) == ("", True)
    flannel.forget(str(path))


def test_a_file_system_without_locks_does(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    setting.succeed("ADD")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert flannel.lock(str(setting.data_dir / "c1")) is not None
