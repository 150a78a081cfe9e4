"""Tools that hang, or are there and do not work: subnet.env does not wait for them, nor does the end."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

from flanneld_py.lab import wait_for
from tests.netns.observing import wait_status
from tests.netns.packet_filters import filter_config, rules_text

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

SOON = 2.0
"""Seconds; a tool is given more."""
SLEEP = "98765"
"""Seconds; by which the process is found again."""


def replaced(host: Host, script: str) -> dict[str, str]:
    """Variables with which each iptables-restore is this script, but for its version."""
    directory = host.directory / "replaced"
    directory.mkdir()
    for family in ("iptables", "ip6tables"):
        for variant in ("", "-nft", "-legacy"):
            path = directory / f"{family}{variant}-restore"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def sleepers() -> list[str]:
    """Numbers of the processes that the hanging tool is."""
    found = subprocess.run(["pgrep", "-f", f"sleep {SLEEP}"], check=False, capture_output=True, text=True)
    return found.stdout.split()


def test_a_tool_that_hangs_holds_up_neither_subnet_env_nor_the_end(lab: Lab) -> None:
    """READY took 40 s, the end 4 s, and the tool lived on."""
    lab.etcd.put_config(filter_config("vxlan", "iptables-legacy", "dual-stack"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    version = "iptables v1.8.9 (legacy)"
    env = replaced(alpha, f"case $* in *--version*) echo '{version}'; exit;; esac\nsleep {SLEEP}")
    beta.start_daemon().wait_ready()
    alpha.start_daemon(["--ip-masq"], env=env)
    wait_for(sleepers, 10, "the tool to be run")
    assert alpha.subnet_file.exists()
    assert alpha.ip("route", "show", "proto", "96")
    said = "restore had not ended after 5.0 s and was killed"
    wait_for(lambda: said in str(alpha.daemon.status()["problems"]), 10, "the tool to be named")
    assert sleepers() == []
    wait_for(sleepers, 30, "the tool to be tried again")
    started = time.monotonic()
    assert alpha.daemon.terminate() == 0
    assert time.monotonic() - started < SOON
    assert sleepers() == []


def test_an_iptables_that_does_not_work_is_as_none(lab: Lab) -> None:
    lab.etcd.put_config(filter_config("vxlan", "iptables-legacy"))
    (alpha,) = lab.add_hosts("alpha")
    env = replaced(alpha, "echo 'error while loading shared libraries: libxtables.so.12' >&2; exit 127")
    alpha.start_daemon(["--ip-masq"], env=env).wait_ready()
    status = wait_status(alpha.daemon, "the rules", lambda seen: seen["state"] == "in sync")
    assert status["rules_by"] == "nft"
    assert "masquerade" in rules_text(alpha, "nft")
