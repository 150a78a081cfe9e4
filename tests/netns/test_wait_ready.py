"""flannelctl wait-ready: against real daemons that are ready, late, hanging, gone, or not ours to ask."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from flanneld_py.lab import wait_for
from tests.netns.nobody import as_nobody
from tests.netns.observing import wait_problem
from tests.netns.scenes import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanneld_py.lab import Host, Lab

AT_ONCE = 1.5
"""Seconds, with the start of the program."""


def as_root(module: str, *args: str) -> list[str]:
    return [sys.executable, "-m", module, *args]


def command(host: Host, *args: str, user: Callable[..., list[str]] = as_root) -> list[str]:
    options = (f"--subnet-file={host.subnet_file}", f"--etcd-prefix={host.prefix}", "--env-file=/dev/null")
    return user("flanneld_py.cli.ctl.main", *options, "wait-ready", *args)


def wait_ready(
    host: Host, *args: str, user: Callable[..., list[str]] = as_root
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(host, *args, user=user), capture_output=True, text=True, check=False)


@pytest.fixture
def host(lab: Lab) -> Host:
    lab.etcd.put_config(config("vxlan"))
    alpha = lab.add_host("alpha")
    # So that others than root find their way to its files.
    for folder in (alpha.run_directory, *alpha.run_directory.parents[:2]):
        folder.chmod(0o755)
    return alpha


def test_ready(host: Host) -> None:
    host.start_daemon().wait_ready()
    began = time.monotonic()
    done = wait_ready(host)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < AT_ONCE
    (key,) = host.etcd.leases()
    assert done.stdout == f"ready: {key.replace('-', '/')}\n"
    told = json.loads(wait_ready(host, "--json").stdout)
    assert told.pop("waited") < AT_ONCE
    subnets = [key.replace("-", "/")]
    assert told == {"ready": True, "reason": None, "fix": None, "subnets": subnets, "pid": host.daemon.pid}


def test_it_waits_for_a_daemon_that_waits_for_etcd(lab: Lab, host: Host) -> None:
    lab.etcd.stop()
    waiting = host.spawn("wait-ready", command(host, "--timeout", "30s"))
    # The daemon comes after it, as a service manager has it that starts both at once.
    daemon = host.start_daemon()
    wait_problem(daemon, "registry-unreachable")
    told = wait_for(waiting.stderr.read_text, 10, "a word on stderr", lambda text: text.endswith("\n"))
    assert told.startswith("flannelctl: waiting for flanneld-py to be ready: ")
    assert f"etcd {lab.etcd.endpoint}: connection refused" in told
    lab.etcd.start()
    assert waiting.wait(15) == 0
    assert waiting.stdout.read_text().startswith("ready: 10.5.")
    assert host.subnet_env()


def test_a_host_that_has_its_subnet_does_not_wait_for_etcd(lab: Lab, host: Host) -> None:
    """Also when etcd has been away for so long that /readyz and the status call the host not ready."""
    daemon = host.start_daemon(["--subnet-lease-ttl=30s"])
    daemon.wait_ready()
    lab.etcd.pause()
    wait_for(daemon.status, 20, "not to be called ready", lambda seen: seen.get("ready") is False)
    assert wait_ready(host, "--timeout=0").returncode == 0
    lab.etcd.resume()


def test_without_a_daemon(host: Host) -> None:
    began = time.monotonic()
    done = wait_ready(host, "--timeout", "2500ms")
    assert 2.5 <= time.monotonic() - began < 2.5 + AT_ONCE
    reason = f"no daemon answers: {host.control_socket}: No such file or directory; "
    assert (done.returncode, done.stdout) == (1, "")
    first, last = done.stderr.splitlines()
    assert first == f"flannelctl: waiting for flanneld-py to be ready: {reason}{START}"
    assert last == f"flannelctl: not ready after 2 s: {reason}{START}"


START = (
    "start flanneld-py, or name its --subnet-file; "
    "if it was started, its log says why it ended (journalctl -u flanneld-py, or supervisord's)"
)


def test_the_file_of_a_dead_daemon_does_not_count(host: Host) -> None:
    daemon = host.start_daemon()
    daemon.wait_ready()
    wait_for(daemon.status, 5, "a ready status", lambda seen: seen.get("ready"))
    daemon.kill()
    for user in (as_root, as_nobody):
        done = wait_ready(host, "--timeout=0", "--json", user=user)
        told = json.loads(done.stdout)
        assert (done.returncode, told["ready"], told["subnets"]) == (1, False, [])
        assert told["reason"].startswith("no daemon answers: ")


def test_a_daemon_that_hangs_is_not_ready_and_does_not_outlast_the_timeout(host: Host) -> None:
    daemon = host.start_daemon()
    daemon.wait_ready()
    daemon.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    done = wait_ready(host, "--timeout=1s")
    took = time.monotonic() - began
    daemon.send_signal(signal.SIGCONT)
    assert done.returncode == 1
    assert "no answer in time; the daemon hangs or is stopped" in done.stderr
    assert took < 1 + 2 * AT_ONCE


def test_whoever_may_not_ask_reads_the_file(host: Host) -> None:
    daemon = host.start_daemon()
    daemon.wait_ready()
    wait_for(daemon.status, 5, "a ready status", lambda seen: seen.get("ready"))
    done = wait_ready(host, "--timeout=0", user=as_nobody)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ready: 10.5.")


def test_whoever_may_not_even_look_is_told(host: Host) -> None:
    host.start_daemon().wait_ready()
    host.run_directory.chmod(0o700)
    done = wait_ready(host, "--timeout=0", user=as_nobody)
    assert (done.returncode, done.stdout) == (1, "")
    assert "permission denied; ask as root" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_daemon_of_another_prefix_is_not_the_one_that_is_meant(host: Host) -> None:
    host.start_daemon().wait_ready()
    done = wait_ready(host, "--etcd-prefix=/other", "--timeout=0")
    assert done.returncode == 1
    assert f"this is the daemon with --etcd-prefix {host.prefix}, not /other; give its prefix" in done.stderr


@pytest.mark.parametrize("timeout", ["60", "-1s", "soon", ""])
def test_wrong_timeouts(host: Host, timeout: str) -> None:
    done = wait_ready(host, "--timeout", timeout)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"flannelctl: --timeout {timeout!r}: expected a number with a unit")
    assert done.stderr.count("\n") == 1
