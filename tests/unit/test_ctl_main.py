"""flannelctl as a program: exit codes, one line on stderr, and what is imported for it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from flanneld_py.cli.ctl.commands import command, exit_code, run
from flanneld_py.errors import (
    ConfigError,
    FlanneldError,
    HostError,
    Refused,
    RegistryError,
    Unreachable,
    UsageError,
)

ARGV = (sys.executable, "-m", "flanneld_py.cli.ctl.main")
HEAVY = {"etcd3", "google", "grpc", "pyroute2", "structlog", "tabulate"}
LIST_MODULES = """
import sys
from flanneld_py.cli.ctl.commands import run
run(sys.argv[1:])
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def _no_environment_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_ENV_FILE", os.devnull)


def modules_of(*args: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, *args], check=True, capture_output=True, text=True
    )
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["leases", "--help"],
        ["status"],
        ["plan"],
        ["wait-ready", "--timeout=0"],
        ["docker-opts", "-d/dev/null"],
        ["config", "check", '{"Network":"10.5.0.0/16"}'],
    ],
)
def test_what_needs_no_etcd_does_not_wait_for_its_libraries(args: list[str], tmp_path: Path) -> None:
    assert not modules_of(f"--subnet-file={tmp_path}/subnet.env", *args) & HEAVY


def test_status_from_a_file_does_not_either(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"version": "0"}))
    assert not modules_of(f"--subnet-file={tmp_path}/subnet.env", "status") & HEAVY


def test_the_module_list_is_no_empty_promise() -> None:
    assert {"grpc", "etcd3"} <= modules_of("--etcd-endpoints=http://127.0.0.1:1", "leases")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError(""), 2),
        (Unreachable(""), 75),
        (Refused(""), 1),
        (RegistryError(""), 1),
        (HostError(""), 1),
        (ConfigError(""), 1),
        (FlanneldError(""), 1),
    ],
)
def test_exit_codes(error: FlanneldError, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize(
    "args",
    [
        ["tea"],
        ["--tea"],
        ["status", "--tea"],
        ["status", "tea"],
        ["config", "set"],
        ["--etcd-prefix=.", "leases"],
        ["--etcd-endpoints=tea", "leases"],
        ["--etcd-cafile=/absent", "--etcd-endpoints=https://127.0.0.1:1", "leases"],
        ["--env-file=/absent", "status"],
    ],
)
def test_wrong_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flannelctl: ")
    assert err.count("\n") == 1


def test_etcd_not_reached(capsys: pytest.CaptureFixture[str]) -> None:
    write = ["config", "set", '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}']
    for args in (["leases"], ["config", "get"], ["config", "check"], write):
        assert run(["--etcd-endpoints=http://127.0.0.1:1", *args]) == 75
        out, err = capsys.readouterr()
        assert out == ""
        assert err == "flannelctl: etcd http://127.0.0.1:1: connection refused\n"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], *([name] for name in sorted(command.commands)), ["config", "set"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert run([*args, flag]) == 0
        assert "Usage: flannelctl" in capsys.readouterr().out


def test_version() -> None:
    done = subprocess.run([*ARGV, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["flannelctl", *done.stdout.split()[1:]]
    assert done.stderr == ""


def test_a_reader_that_leaves_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run([*ARGV, "--help"], check=False, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_on_a_terminal(tmp_path: Path, environment: dict[str, str], coloured: bool) -> None:
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    try:
        argv = [*ARGV, f"--subnet-file={tmp_path}/subnet.env", "status"]
        done = subprocess.run(argv, check=False, stdout=slave, env={**os.environ, **environment})
        assert done.returncode == 1
        output = os.read(master, 65_536)
    finally:
        os.close(slave)
        os.close(master)
    assert b"No daemon answers on" in output
    assert (b"\x1b[" in output) is coloured


STATUS = {
    "version": "0",
    "pid": 1,
    "state": "starting",
    "ready": False,
    "prefix": "/p",
    "node_id": "n",
    "offloads": {},
    "backend": None,
    "networks": [],
    "subnets": [],
    "mtu": None,
    "external": None,
    "problems": [],
    "lease": {"state": "none", "key": None, "ttl": None, "etcd_lease": None, "reason": None},
    "registry": {"state": "connecting", "endpoint": None, "revision": None, "since": "", "error": None},
    "peers": {"count": 0, "held": 0, "bad": {}, "bad_count": 0},
    "drift": {"repaired": {}, "ops": {"set": 0, "del": 0}, "failed": []},
}


def test_interrupted_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*ARGV, "status"], check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
