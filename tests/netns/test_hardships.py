"""What befalls a daemon that is no fault of etcd or the network: its stderr, its files, limits, squatters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from flanneld_py.lab.daemon import COMMAND
from tests.netns.etcd_servers import Authority
from tests.netns.observing import events, wait_problem, wait_status
from tests.netns.oracle import differences
from tests.netns.scenes import config, overlay
from tests.netns.test_command_line import CONFIGURATION, USAGE, run
from tests.netns.test_daemon import STOPPED_WITHIN, ask

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanneld_py.lab import Lab

STUCK = """
import fcntl, os, sys
reader, writer = os.pipe()
fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
os.set_inheritable(reader, True)
os.dup2(writer, 2)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""The smallest pipe there is, whose reader never reads."""
SICK_STDERR = {
    "a reader that leaves": ["bash", "-c", 'exec "$@" 2> >(head -n 3 >/dev/null)', "bash"],
    "a reader that is stuck": [sys.executable, "-c", STUCK],
    "a full disk": ["sh", "-c", 'exec "$@" 2>/dev/full', "sh"],
    "none": ["sh", "-c", 'exec "$@" 2>&-', "sh"],
    "nothing at all": ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"],
}


# --- stderr ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SICK_STDERR)
def test_nothing_depends_on_who_reads_the_log(lab: Lab, case: str) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    daemon = alpha.start_daemon(["-v=1"], wrapper=SICK_STDERR[case])
    daemon.wait_ready()
    for number in range(40):
        lab.etcd.ctl("put", f"{lab.etcd.prefix}/subnets/10.9.{number}.0-24", "garbage " * 40)
    wait_status(daemon, "the garbage", lambda s: s["peers"]["bad_count"] == 40)
    alpha.ip("link", "delete", "flannel.1")
    wait_for(
        lambda: [link["ifname"] for link in alpha.ip("link", "show")], 5, "it", lambda s: "flannel.1" in s
    )
    begun = time.monotonic()
    assert daemon.terminate(STOPPED_WITHIN) == 0
    assert time.monotonic() - begun < 2, "nothing had to be abandoned"
    assert daemon.status()["state"] == "stopped"


HANGING = """
import time
from flanneld_py.cli.daemon import main
from flanneld_py.daemon.publisher import Publisher

publish = Publisher.publish
def hang(self, status):
    publish(self, status)
    if status["state"] == "stopped":
        time.sleep(60)
Publisher.publish = hang
main()
"""
"""A daemon whose disk hangs at the last file it writes."""


def test_a_hanging_disk_does_not_delay_the_end(lab: Lab) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    process = alpha.spawn("hanging", [sys.executable, "-c", HANGING, *alpha.flags])
    wait_for(alpha.subnet_file.exists, 10, "subnet.env")
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOPPED_WITHIN) == 0


def test_a_signal_during_the_start_ends_it_at_once(lab: Lab) -> None:
    """Whatever it is doing by then; the interpreter alone takes some 15 ms."""
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    argv = alpha.entered([*COMMAND, *alpha.flags])
    for number in (signal.SIGTERM, signal.SIGINT):
        for milliseconds in (60, 100, 150, 200, 250, 300, 400):
            with subprocess.Popen(argv, stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"]}) as process:
                wait_for(partial(took_signals, process.pid), 5, "its first steps", interval=0.001)
                time.sleep((milliseconds - 60) / 1000)
                process.send_signal(number)
                begun = time.monotonic()
                _, err = process.communicate(timeout=10)
            assert (process.returncode, b"Traceback" in err) == (0, False), (milliseconds, err)
            assert time.monotonic() - begun < STOPPED_WITHIN


def took_signals(pid: int) -> bool:
    """Whether SIGTERM has a handler or is blocked (proc(5), SigCgt and SigBlk)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:  # noqa: PTH123
        masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigCgt", "SigBlk"))]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_stands_in_the_place_of_old_files_is_ignored(lab: Lab, kind: str) -> None:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    alpha.state_directory.mkdir()
    for path in (alpha.state_directory / "state.json", alpha.status_file):
        path.mkdir() if kind == "directory" else os.mkfifo(path)
    daemon = alpha.start_daemon()
    wait_for(daemon.ready_after, 10, "the daemon to be ready")
    (told,) = events(daemon, "file_ignored")
    assert told["path"] == str(alpha.state_directory / "state.json")
    assert "Traceback" not in daemon.log_text()
    assert daemon.terminate(STOPPED_WITHIN) == 0


@pytest.mark.parametrize("kind", ["directory", "fifo", "garbage"])
def test_a_damaged_node_id_is_named(lab: Lab, kind: str) -> None:
    alpha = lab.add_host("alpha")
    alpha.state_directory.mkdir()
    path = alpha.state_directory / "node-id"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            path.write_bytes(b"\xff\x00garbage\n" * 10_000)
    flags = [flag for flag in alpha.flags if not flag.startswith("--node-id")]
    ended = run(alpha, *flags)
    assert ended.code == CONFIGURATION
    assert str(path) in ended.line
    assert len(ended.line) < 500


def test_a_run_directory_that_is_deleted_comes_back(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    env = alpha.subnet_file.read_bytes()
    shutil.rmtree(alpha.run_directory)
    alpha.daemon.send_signal(signal.SIGHUP)
    for path in (alpha.subnet_file, alpha.status_file, alpha.control_socket):
        wait_for(path.exists, 5, path.name)
    assert alpha.subnet_file.read_bytes() == env
    wait_for(lambda: ask(alpha, "status")["result"]["ready"], 5, "an answer")


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [6, 8, 10, 12, 14, 40, 127])
def test_too_low_a_limit_on_open_files_is_named(lab: Lab, number: int) -> None:
    alpha = lab.add_host("alpha")
    ended = run(alpha, *alpha.flags, wrapper=["prlimit", f"--nofile={number}"], env={"NOTIFY_SOCKET": "/x"})
    assert ended.code == CONFIGURATION, ended
    assert "(EMFILE); raise the limit on open files" in ended.line


def test_too_low_a_limit_on_memory_is_named(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    for megabytes in (20, 40, 120, 700, 2047):
        ended = run(alpha, *alpha.flags, wrapper=["prlimit", f"--as={megabytes << 20}"])
        assert ended.code == CONFIGURATION, ended
        assert "raise the limit" in ended.line


# --- locks ----------------------------------------------------------------------------------------


def test_who_holds_the_lock_is_named(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    second = [f"--subnet-file={alpha.directory}/b/subnet.env", f"--state-dir={alpha.directory}/b"]
    ended = run(alpha, *alpha.flags, *second)
    assert ended.code == CONFIGURATION
    assert f"is held by pid {alpha.daemon.pid} (" in ended.line


def test_one_subnet_file_for_two_daemons_is_refused(lab: Lab) -> None:
    (alpha,) = overlay(lab, "vxlan", "alpha")
    other = ["--etcd-prefix=/another/network", f"--state-dir={alpha.directory}/b"]
    ended = run(alpha, *alpha.flags, *other)
    assert ended.code == CONFIGURATION
    assert f"--subnet-file {alpha.subnet_file} is in use by another flanneld-py" in ended.line
    assert f"pid {alpha.daemon.pid} (" in ended.line
    assert ask(alpha, "status")["result"]["prefix"] == lab.etcd.prefix
    assert differences(alpha, "vxlan") == []


def test_odd_prefixes(lab: Lab) -> None:
    alpha = lab.add_host("alpha")
    ended = run(alpha, *alpha.flags, os.fsdecode(b"--etcd-prefix=/\xff\xfe"))
    assert ended.code == USAGE
    assert "expected UTF-8" in ended.line
    lab.etcd.prefix = lab.etcd.prefix + "/long" * 40
    lab.etcd.put_config(config("vxlan"))
    beta = lab.add_host("beta")
    beta.start_daemon().wait_ready()
    assert "another flanneld-py" in run(beta, *beta.flags, f"--state-dir={beta.directory}/b").line


# --- credentials ----------------------------------------------------------------------------------


def test_a_password(fresh_lab: Lab) -> None:
    etcd = fresh_lab.etcd
    etcd.put_config(config("vxlan"))
    for line in ("user add root:r00t-s3cret", "user grant-role root root", "auth enable"):
        etcd.ctl(*line.split())
    alpha = fresh_lab.add_host("alpha")
    daemon = alpha.start_daemon(["--etcd-username=root"], env={"FLANNELD_ETCD_PASSWORD": "r00t-s3cret"})
    daemon.wait_ready()
    assert "r00t-s3cret" not in daemon.log_text() + json.dumps(daemon.status())
    beta = fresh_lab.add_host("beta")
    flags = ["-v=1", "--etcd-username=root", "--etcd-password=s3cret-wrong"]
    stranger = beta.start_daemon(flags)
    status = wait_status(stranger, "to be refused", lambda s: s["registry"]["state"] == "refused")
    assert "s3cret-wrong" not in stranger.log_text() + json.dumps(status)
    ended = run(fresh_lab.add_host("gamma"), "--etcd-username=root")
    assert (ended.code, ended.line) == (
        USAGE,
        "flanneld-py: --etcd-username and --etcd-password (or --etcd-password-file): "
        "expected both or neither",
    )


@pytest.fixture
def tls(lab: Lab, tmp_path: Path) -> Iterator[tuple[Authority, str]]:
    """An authority, and the URL of an etcd that wants certificates by it."""
    authority = Authority(tmp_path / "ours")
    url = "https://192.0.2.254:3379"
    certificate, key = authority.issue("server", "IP:192.0.2.254")
    options = {
        "data-dir": tmp_path / "data",
        "listen-client-urls": url,
        "advertise-client-urls": url,
        "listen-peer-urls": "http://127.0.0.1:3380",
        "initial-advertise-peer-urls": "http://127.0.0.1:3380",
        "initial-cluster": "default=http://127.0.0.1:3380",
        "cert-file": certificate,
        "key-file": key,
        "trusted-ca-file": authority.ca,
    }
    etcd = lab.etcd.namespace.spawn(
        "etcd-tls", ["etcd", *(f"--{name}={value}" for name, value in options.items()), "--client-cert-auth"]
    )
    yield authority, url
    etcd.kill()


def test_client_certificates(lab: Lab, tls: tuple[Authority, str]) -> None:
    """The line that the status gives for a missing config has them, too."""
    authority, url = tls
    certificate, key = authority.issue("alpha")
    alpha = lab.add_host("alpha")
    daemon = alpha.start_daemon(
        [f"--etcd-endpoints={url}", f"--etcd-cafile={authority.ca}", f"--etcd-certfile={certificate}"],
        env={"FLANNELD_ETCD_KEYFILE": str(key)},
    )
    (problem,) = wait_problem(daemon, "config-missing")["problems"]
    alpha.run(["sh", "-euc", problem["fix"]])
    daemon.wait_ready()
    assert daemon.status()["registry"]["endpoint"] == url
    assert lab.etcd.leases() == {}, "they are in the other etcd"
